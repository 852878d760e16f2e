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

import functools
from collections.abc import Sequence

import numpy as np
import torch

from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.core.sampling import RankQuery
from pearl.core.trie import shared_prefix
from pearl.drafters.feature.forward_rows import (
    FeatureCache,
    FeatureSequence,
    batch_mask,
    concatenated,
    layer_masks,
    rows_of,
)
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.one_pass import Guess, Guesses, OnePassSource, PathsQuery, with_confidence
from pearl.machine.transfers import Fetched, sent
from pearl.machine.transfers import rows_of as some_rows
from pearl.models.static_shapes.network import NetworkForward
from pearl.models.timing import best_of

_TIMED = (64, 3)  # tokens of text, and repetitions, when a forward is timed


class FeatureSource(OnePassSource):
    """Chains and trees of P-EAGLE, or of the feature drafter that pearl trained before it."""

    origin = "feature"

    def __init__(self, drafter: FeatureDrafter, top_k: int = 0, longest: int = 1 << 20):
        """`drafter` has its target attached. `top_k`: paths kept at each depth, 0: `TOP_K`; 1 makes chains.
        `longest`: tokens of a sequence."""
        super().__init__(drafter.shape.depths, top_k, longest)
        self._drafter = drafter.eval()
        self.forward = NetworkForward(drafter.read, drafter.device)
        self.layers = drafter.shape.features
        self.device = drafter.device
        self.of_vocabulary(drafter.vocabulary)
        self.begin(0, SamplingParams())
        self.time()

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        """The target tells the features of the whole prompt in any case."""
        old = self._sequences.get(batch_slot) or FeatureSequence(params, FeatureCache(self._drafter))
        self._sequences[batch_slot] = FeatureSequence(params, old.cache, old.read if continues else [])

    def observe(self, features: Features, batch_slot: int = 0) -> None:
        self._sequences[batch_slot].features.append(features)
        self._sequences[batch_slot].known += len(features)

    def unread(self, batch_slot: int, tokens: Sequence[int]) -> int:
        state = self._sequences[batch_slot]
        return max(0, self.known(state, tokens) - len(state.read))

    def known(self, state: FeatureSequence, tokens: Sequence[int]) -> int:
        """Up to the token after the last one whose features are there."""
        return min(len(tokens), state.known + 1) if self.layers else len(tokens)

    def ready(self, state: FeatureSequence, trunk: Sequence[int]) -> bool:
        """Whether the features of all of the text but its last token are there, if any are wanted."""
        return not self.layers or state.known >= max(1, len(trunk) - 1)

    @torch.inference_mode()
    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        """One forward. For each path of each sequence: what follows each node on its way, the trunk's last token first,
        and guesses of K depths after its end."""
        if not queries:
            return []
        drafter = self._drafter
        inputs, positions, blocks, wanted = [], [], [], []
        first = 0
        for one in queries:
            kept = min(shared_prefix(one.state.read, one.trunk), len(one.trunk) - 1)
            rows, where, block, mine = rows_of(drafter, one, kept)
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
            one.state.read = list(one.trunk)
            first += block.rows
        self.forwards += 1
        self.rows += first
        asked = some_rows(hidden, wanted)
        self._hidden = iter(asked)
        return self.tables(queries, drafter.logits(asked).float())

    def _ranked(self, queries: Sequence[RankQuery]) -> list[Guesses]:
        if not self._drafter.shape.markov_rank:
            return super()._ranked(queries)
        return self._each_after(queries)

    @torch.inference_mode()
    def _after(
        self, row: torch.Tensor, hidden: torch.Tensor, position: int, params: SamplingParams, tokens: Sequence[int]
    ) -> list[list[Guess]]:
        """The guesses of one row after each of `tokens`; the best one is as likely as the head of confidence says.

        row: [D], or over the target's vocabulary; hidden: [H]"""
        bias, sure = self._drafter.after(sent(torch.tensor(tokens), self.device), hidden.expand(len(tokens), -1))
        logits = row.expand(len(tokens), -1)
        if logits.shape[1] != bias.shape[1]:
            bias = bias.new_zeros(logits.shape).index_copy_(1, self._drafter.vocabulary, bias)
        coming = Fetched(torch.nn.functional.logsigmoid(sure.float()))
        found = super()._ranked([RankQuery(logits + bias.float(), params, [position] * len(tokens))])[0]
        return list(map(with_confidence, found, coming.wait().tolist()))  # they came before the guesses

    def probe(self, seed: int) -> None:
        """Some forwards over a text of that number."""
        generator, (length, _) = torch.Generator().manual_seed(seed), _TIMED
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

    def time(self) -> None:
        """Finds the seconds of a forward of 1, 2, ... leaves."""
        length, rounds = _TIMED
        text = [0] * length
        if self.layers:
            self.observe(np.zeros((length - 1, self._drafter.shape.feature_row), np.int16))
        some = [PathsQuery(self._sequences[0], text, [[0]] * count) for count in range(1, self.max_leaves + 1)]
        self.costs = tuple(best_of(rounds, functools.partial(self.read_on, [one]), self.device) for one in some)
        self.begin(0, SamplingParams())
        self.forwards = self.rows = 0
