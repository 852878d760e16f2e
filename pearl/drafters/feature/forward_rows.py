"""The rows of one forward of the feature drafter: what each of them reads, and what it sees.

Knows: the cache of confirmed positions, hidden states that have arrived, and positions and masks of several sequences
side by side. Refuses to know: tries, sampling, and which paths are worth a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pearl.core.messages import Features
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.one_pass import DraftedText, PathsQuery
from pearl.machine.transfers import sent
from pearl.models.kv_cache.slot_cache import KeyValue

_GROW = 256  # slots by which the cache grows


class FeatureCache:
    """Keys and values of the confirmed positions, [1, kv heads, slots, head_dim] a layer."""

    def __init__(self, drafter: FeatureDrafter):
        shape = drafter.shape
        empty = torch.zeros(1, shape.kv_heads, 0, shape.head_dim, device=drafter.device, dtype=drafter.dtype)
        self._layers: list[KeyValue] = [(empty, empty) for _ in drafter.layers]

    def upto(self, count: int) -> list[KeyValue]:
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values in self._layers]

    def keep(self, made: Sequence[KeyValue], first: int, rows: slice) -> None:
        """Takes over those new rows as the positions from `first` on."""
        for number, new in enumerate(made):
            keys, values = (
                _written(old, part[:, :, rows], first) for old, part in zip(self._layers[number], new, strict=True)
            )
            self._layers[number] = keys, values


def _written(old: Tensor, rows: Tensor, first: int) -> Tensor:
    last = first + rows.shape[2]
    if last > old.shape[2]:
        more = -(-(last - old.shape[2]) // _GROW) * _GROW
        old = torch.cat([old.to(rows.dtype), rows.new_zeros(1, rows.shape[1], more, rows.shape[3])], 2)
    old[:, :, first:last] = rows
    return old


@dataclass
class FeatureSequence(DraftedText):
    """What is known of one sequence."""

    cache: FeatureCache
    read: list[int] = field(default_factory=list)  # confirmed tokens in the cache
    features: list[Features] = field(default_factory=list)  # one piece after the other
    known: int = 0  # positions whose features have come

    def between(self, first: int, last: int, device: torch.device) -> Tensor:
        """The features of the positions from `first` up to `last`, bfloat16 [last - first, F]."""
        found, at = [], self.known
        for piece in reversed(self.features):
            if at <= first:
                break
            at -= len(piece)
            if at < last:
                found.append(_rows(piece[max(0, first - at) : last - at], device))
        return torch.cat(found[::-1])


def _rows(piece: Features, device: torch.device) -> Tensor:
    here = torch.tensor(piece).view(torch.bfloat16) if isinstance(piece, np.ndarray) else piece.rows
    return sent(here, device)


@dataclass(frozen=True)
class RowBlock:
    """The rows of one sequence in a forward."""

    kept: int  # rows in its cache
    fresh: int  # rows of its prefix
    groups: tuple[tuple[int, int], ...]  # first row and count of each leaf's path and slots, after those

    @property
    def rows(self) -> int:
        return self.fresh + sum(count for _, count in self.groups)


def concatenated(past: Sequence[Sequence[KeyValue]]) -> list[KeyValue]:
    """The keys and values of several sequences, layer by layer, one after the other."""
    if len(past) == 1:
        return list(past[0])
    layers = zip(*past, strict=True)
    return [(torch.cat([k for k, _ in layer], 2), torch.cat([v for _, v in layer], 2)) for layer in layers]


def block_masks(masks: Sequence[Tensor], past: Sequence[int]) -> Tensor:
    """bool [all rows, all past + all rows]: each sequence sees itself alone. `past`: columns of each before rows."""
    if len(masks) == 1:
        return masks[0]
    cached = torch.block_diag(*(mask[:, :count] for mask, count in zip(masks, past, strict=True)))
    new = torch.block_diag(*(mask[:, count:] for mask, count in zip(masks, past, strict=True)))
    return torch.cat([cached, new], 1).bool()


def batch_mask(blocks: Sequence[RowBlock]) -> Tensor:
    """bool [rows, all kept + rows]: each sequence sees itself alone."""
    masks = [tree_mask(block.kept, block.fresh, block.groups) for block in blocks]
    return block_masks(masks, [block.kept for block in blocks])


def layer_masks(mask: Tensor, windows: Sequence[int], rows: Sequence[int], keys: Sequence[int]) -> list[Tensor]:
    """What each layer sees, bool [R, S + R]: all that `mask` says, or of it the last positions as far as its window
    reaches, a row's own among them. `rows`, `keys`: positions of the R rows and of the S keys before them."""
    if not windows:
        return [mask]
    behind = torch.tensor(rows)[:, None] - torch.tensor([*keys, *rows])
    made = {window: mask & (behind < window) if 0 < window <= max(rows) else mask for window in set(windows)}
    return [made[window] for window in windows]


def tree_mask(kept: int, fresh: int, groups: Sequence[tuple[int, int]]) -> Tensor:
    """bool [rows, kept + rows]; `groups`: first row and count of each leaf's path and slots, after the fresh rows."""
    rows = fresh + sum(count for _, count in groups)
    mask = torch.zeros(rows, kept + rows, dtype=torch.bool)
    mask[:, :kept] = True
    mask[:fresh, kept : kept + fresh] = torch.ones(fresh, fresh, dtype=torch.bool).tril()
    mask[fresh:, kept : kept + fresh] = True
    for first, count in groups:
        own = slice(first, first + count)
        mask[own, kept + first : kept + first + count] = torch.ones(count, count, dtype=torch.bool).tril()
    return mask


def query_rows(drafter: FeatureDrafter, query: PathsQuery, kept: int) -> tuple[Tensor, list[int], RowBlock, list[int]]:
    """The rows of one sequence, [R, W], their positions, who sees whom, and the rows whose guesses are wanted. `kept`:
    positions whose rows are in the cache, or are none (`DrafterShape.first_row`)."""
    prefix, slots, before = query.prefix, drafter.shape.depths - 1, drafter.shape.first_row
    kept = max(kept, before)
    fresh = len(prefix) - kept
    known = _known_rows(drafter, query, kept)
    ahead = drafter.slots(1, slots)[0]
    inputs, positions, groups = [known[:fresh]], list(range(kept, len(prefix))), []
    wanted, at, rows = [], fresh, fresh
    for path in query.paths:
        inputs += [known[at : at + len(path)], ahead]
        at += len(path)
        count = len(path) + slots
        positions += range(len(prefix), len(prefix) + count)
        groups.append((rows, count))
        wanted += [fresh - 1, *range(rows, rows + count)][-query.rows(path, slots + 1) :]
        rows += count
    return torch.cat(inputs), positions, RowBlock(kept - before, fresh, tuple(groups)), wanted


def _known_rows(drafter: FeatureDrafter, query: PathsQuery, kept: int) -> Tensor:
    """The prefix's rows from `kept` on, with features, and all paths' rows, without, [R, W]."""
    prefix, paths, device = query.prefix, query.paths, drafter.device
    tokens = sent(torch.tensor([*prefix[kept:], *(token for path in paths for token in path)]), device)
    fresh = len(prefix) - kept
    withheld = torch.ones(len(tokens), dtype=torch.bool)
    features = torch.zeros(len(tokens), drafter.shape.feature_row, dtype=torch.bfloat16, device=device)
    if drafter.shape.features:
        withheld[:fresh] = torch.arange(kept, len(prefix)) == 0
        first = max(kept, 1)
        if first < len(prefix):
            features[first - kept : fresh] = query.state.between(first - 1, len(prefix) - 1, device)
    return drafter.known(tokens[None], features[None], sent(withheld[None], device))[0]
