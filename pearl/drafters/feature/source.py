"""A network over hidden states that drafts in parallel: one forward gives the distributions of the next K tokens.

What the target has read comes with its verdicts, as features. Known positions whose features are there are read once
and stay in the cache; tokens beyond them are guesses or too new, so they enter with what was learned for that instead
and are read anew each time. One forward holds the newly confirmed rows, the paths of the leaves that it extends, and
the slots after each leaf:

    confirmed rows                 see the text up to themselves
    a leaf's path                  sees the text and itself up to each row
    a leaf's slots                 see the text, the path, and themselves up to each row (`pearl.drafters.feature.mask`)

Bits are of no account here: whatever is drafted, the target decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.core.trie import shared_prefix
from pearl.drafters.feature.forward_rows import (
    FeatureCache,
    FeatureSequence,
    batch_mask,
    concatenated,
    layer_masks,
    query_rows,
)
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.parallel_source import ParallelSource
from pearl.drafters.one_pass import Guesses, PathsQuery
from pearl.machine.transfers import select_rows
from pearl.models import timing


class FeatureSource(ParallelSource):
    """Chains and trees of P-EAGLE, or of the feature drafter that pearl trained before it."""

    _drafter: FeatureDrafter

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        """The target tells the features of the whole prompt in any case."""
        old = self._sequences.get(batch_slot) or FeatureSequence(params, FeatureCache(self._drafter))
        self._sequences[batch_slot] = FeatureSequence(params, old.cache, old.read if continues else [])

    @torch.inference_mode()
    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        """One forward. For each path of each sequence: what follows each node on its way, the prefix's last token
        first, and guesses of K depths after its end."""
        if not queries:
            return []
        drafter = self._drafter
        inputs, positions, blocks, wanted = [], [], [], []
        first = 0
        for one in queries:
            kept = min(shared_prefix(one.state.read, one.prefix), len(one.prefix) - 1)
            rows, where, block, mine = query_rows(drafter, one, kept)
            inputs.append(rows)
            positions += where
            blocks.append(block)
            wanted += [first + row for row in mine]
            first += len(rows)
        past = [one.state.cache.upto(block.kept) for one, block in zip(queries, blocks, strict=True)]
        before = drafter.shape.first_row
        keys = [position for block in blocks for position in range(before, before + block.kept)]
        masks = layer_masks(batch_mask(blocks), drafter.shape.windows, positions, keys)
        hidden, *new = self.forward([positions], torch.cat(inputs), masks, concatenated(past))
        made = list(zip(new[::2], new[1::2], strict=True))
        first = 0
        for one, block in zip(queries, blocks, strict=True):
            one.state.cache.keep(made, block.kept, slice(first, first + block.fresh))
            one.state.read = list(one.prefix)
            first += block.rows
        self.forwards += 1
        self.rows += first
        asked = select_rows(hidden, wanted)
        return self.tables(queries, drafter.logits(asked).float(), asked)

    @property
    def _looks_back(self) -> bool:
        return self._drafter.shape.markov_rank > 0

    def _said_of(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        bias, sure = self._drafter.after(tokens, hidden.expand(len(tokens), -1))
        return bias, torch.nn.functional.logsigmoid(sure.float())

    def _timed(self, count: int) -> PathsQuery:
        return PathsQuery(self._sequences[0], [0] * timing.TIMED[0], [[0]] * count)

    def probe(self, seed: int) -> None:
        """Some forwards over a text of that number."""
        generator, (length, _) = torch.Generator().manual_seed(seed), timing.TIMED
        text = torch.randint(self._drafter.shape.known or 2, (length + 2,), generator=generator).tolist()
        self.begin(0, SamplingParams())
        if self.layers:
            features = torch.randn(length + 1, self._drafter.shape.feature_row, generator=generator)
            self.observe(features.to(torch.bfloat16).view(torch.int16).numpy())
        for more in range(3):
            for leaves in range(1, self.max_leaves + 1):
                self.read_on(
                    [PathsQuery(self._sequences[0], text[: length + more], [[token] for token in range(leaves)])]
                )
        self.begin(0, SamplingParams())
