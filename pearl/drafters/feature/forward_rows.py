"""What drafters over hidden states share: a cache, features that have come, several sequences side by side.

Knows: the cache of confirmed positions, hidden states that have arrived, masks of several sequences. Refuses to know:
tries, sampling, and which rows a forward has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pearl.core.messages import Features
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.one_pass import DraftedText
from pearl.machine.transfers import sent
from pearl.models.kv_cache.slot_cache import KeyValue

_GROW = 256  # slots by which the cache grows


class FeatureCache:
    """Keys and values of rows that were read, those of confirmed positions first: [1, kv heads, slots, head_dim] a
    layer."""

    def __init__(self, drafter: FeatureDrafter):
        shape = drafter.shape
        empty = torch.zeros(1, shape.kv_heads, 0, shape.head_dim, device=drafter.device, dtype=drafter.dtype)
        self._layers: list[KeyValue] = [(empty, empty) for _ in drafter.layers]

    def upto(self, count: int) -> list[KeyValue]:
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values in self._layers]

    def keep(self, made: Sequence[KeyValue], first: int, rows: slice) -> None:
        """Takes over those new rows, from slot `first` on."""
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


def layer_masks(mask: Tensor, windows: Sequence[int], rows: Sequence[int], keys: Sequence[int]) -> list[Tensor]:
    """What each layer sees, bool [R, S + R]: all that `mask` says, or of it the last positions as far as its window
    reaches, a row's own among them. `rows`, `keys`: positions of the R rows and of the S keys before them."""
    if not windows:
        return [mask]
    behind = torch.tensor(rows)[:, None] - torch.tensor([*keys, *rows])
    made = {window: mask & (behind < window) if 0 < window <= max(rows) else mask for window in set(windows)}
    return [made[window] for window in windows]
