"""DFlash and DSpark as a draft source: one block a leaf, its rows' distributions, a tree of them.

The anchor is the last token before which all features are there. Its block holds it, the path of a leaf beyond it where
the drafter runs ahead of its target, and mask tokens up to the length that the network was trained with; so a leaf that
lies deeper leaves fewer rows to guess, and one at the end of the block waits for features. Once these have come, the
block of the new root is read again.

Bits are of no account here: whatever is drafted, the target decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.core.trie import shared_prefix
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.feature.forward_rows import FeatureSequence, concatenated
from pearl.drafters.feature.parallel_source import ParallelSource
from pearl.drafters.guesses import Guesses
from pearl.drafters.one_pass import Leaf, PathsQuery
from pearl.machine.transfers import select_rows
from pearl.models import timing
from pearl.models.kv_cache.slot_cache import KeyValue


@dataclass
class _Rows:
    """The rows of one forward, of all blocks."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)  # position of the anchor of each row's block
    blocks: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)  # rows whose guesses are


class DFlashSource(ParallelSource):
    """Chains and trees of a DFlash or DSpark network."""

    _drafter: DFlashDrafter

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        """The target tells the features of the whole prompt in any case."""
        old = self._sequences.get(batch_slot)
        made = FeatureSequence(params, old.cache if old and continues else [])
        made.read = old.read if old and continues else []
        self._sequences[batch_slot] = made

    def guesses_after(self, path: Sequence[int]) -> int:
        return max(0, self.depths - len(path))

    def _anew(self, query: TreeQuery) -> bool:
        """A row that holds a token guesses nothing: what follows the way to a leaf isn't said by its block."""
        return False

    def _leaves(self, query: TreeQuery) -> list[Leaf]:
        return self._and_root(query, [leaf for leaf in super()._leaves(query) if self.guesses_after(leaf[0])])

    @torch.inference_mode()
    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        if not queries:
            return []
        drafter, rows = self._drafter, _Rows()
        for number, one in enumerate(queries):
            self._extend_context(one)
            for path in one.paths:
                self._add_block(rows, number, one, path)
        past = concatenated([one.state.cache for one in queries])
        numbers = [rows.tokens, rows.positions]
        hidden = select_rows(self.forward(numbers, None, self._masks(rows, queries), past)[0], rows.wanted)
        self.forwards += 1
        self.rows += len(rows.tokens)
        return self.tables(queries, drafter.logits(hidden).float(), hidden)

    def _extend_context(self, query: PathsQuery) -> None:
        """Keys and values of the positions before the anchor that are not there yet."""
        state, count = query.state, len(query.prefix) - 1
        kept = min(shared_prefix(state.read, query.prefix), len(state.read), count)
        cache: list[KeyValue] = [(k[:, :, :kept], v[:, :, :kept]) for k, v in state.cache]
        if kept < count:
            features = state.between(kept, count, self.device)
            new = self._drafter.context(features, torch.arange(kept, count, device=self.device))
            cache = concatenated([cache, new]) if cache else new
        state.cache, state.read = cache, list(query.prefix[:count])

    def _add_block(self, rows: _Rows, number: int, query: PathsQuery, path: Sequence[int]) -> None:
        shape, anchor, first = self._drafter.shape, len(query.prefix) - 1, len(rows.tokens)
        block = [query.prefix[-1], *path, *[shape.mask_token] * shape.block][: shape.block]
        rows.tokens += block
        rows.positions += range(anchor, anchor + shape.block)
        rows.anchors += [anchor] * shape.block
        rows.blocks += [rows.blocks[-1] + 1 if rows.blocks else 0] * shape.block
        rows.sequences += [number] * shape.block
        rows.wanted += range(first + shape.block - self.guesses_after(path), first + shape.block)

    def _masks(self, rows: _Rows, queries: Sequence[PathsQuery]) -> list[Tensor]:
        """Who sees whom, of each layer: bool [R, context + R]."""
        counts = [len(one.prefix) - 1 for one in queries]
        whose = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        places = torch.cat([torch.arange(count) for count in counts])
        positions, anchors, blocks, sequences = (
            torch.tensor(some)[:, None] for some in (rows.positions, rows.anchors, rows.blocks, rows.sequences)
        )
        context, own = whose == sequences, blocks == blocks.T
        made: dict[tuple[int, bool], Tensor] = {}
        for window, causal in zip(self._drafter.shape.windows, self._drafter.shape.causal, strict=True):
            before, beside = context, own
            if window and self._drafter.shape.window_from_anchor:
                before = before & (places >= anchors - window)
            elif window:
                before, beside = before & (positions - places < window), own & (positions - positions.T < window)
                beside = beside & (causal | (positions.T - positions < window))
            if causal:
                beside = beside & (positions >= positions.T)
            made.setdefault((window, causal), torch.cat([before, beside], 1))
        return [made[key] for key in zip(self._drafter.shape.windows, self._drafter.shape.causal, strict=True)]

    @property
    def _looks_back(self) -> bool:
        return self._drafter.markov_head is not None or self._drafter.confidence_head is not None

    def _said_of(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._drafter.after(tokens, hidden)

    def probe(self, seed: int) -> None:
        """Some forwards over a text of that number."""
        generator, (length, _) = torch.Generator().manual_seed(seed), timing.TIMED
        text = torch.randint(self._drafter.shape.known, (length,), generator=generator).tolist()
        self.begin(0, SamplingParams())
        features = torch.randn(length - 1, self._drafter.shape.feature_row, generator=generator)
        self.observe(features.to(torch.bfloat16).view(torch.int16).numpy())
        for end in range(length - 2, length + 1):
            for count in range(1, self.max_leaves + 1):
                paths = [[token] for token in range(count)] if self.depths > 1 else [[]] * count
                self.read_on([PathsQuery(self._sequences[0], text[:end], paths, way=False)])
        self.begin(0, SamplingParams())
