"""What sources have in common whose network reads hidden states and guesses K tokens in one forward.

Knows: features come with verdicts, and guesses may depend on the token before. Refuses to know: the rows of a forward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import RankQuery
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.feature.forward_rows import FeatureSequence
from pearl.drafters.guesses import Guess, Guesses, RowAfter, with_confidence
from pearl.drafters.one_pass import Leaf, OnePassSource, PathsQuery
from pearl.machine.transfers import Fetched, sent
from pearl.models import timing
from pearl.models.static_shapes.network import NetworkForward


class ParallelSource(OnePassSource):
    """Of a network with its target attached, that has `shape`, `read`, `vocabulary` and `device`."""

    origin = "feature"

    def __init__(self, drafter: Any, top_k: int = 0, longest: int = 1 << 20):
        """`top_k`, `longest`: see `OnePassSource`."""
        super().__init__(drafter.shape.depths, top_k, longest)
        self._drafter = drafter.eval()
        self.forward = NetworkForward(drafter.read, drafter.device)
        self.layers, self.device = drafter.shape.features, drafter.device
        self.of_vocabulary(drafter.vocabulary)
        self.begin(0, SamplingParams())
        self.time()

    def observe(self, features: Features, batch_slot: int = 0) -> None:
        self._sequences[batch_slot].features.append(features)
        self._sequences[batch_slot].known += len(features)

    def unread(self, batch_slot: int, tokens: Sequence[int]) -> int:
        state = self._sequences[batch_slot]
        return max(0, self.known(state, tokens) - len(state.read))

    def known(self, state: FeatureSequence, tokens: Sequence[int]) -> int:
        """Up to the token after the last one whose features are there."""
        return min(len(tokens), state.known + 1) if self.layers else len(tokens)

    def ready(self, state: FeatureSequence, prefix: Sequence[int]) -> bool:
        """Whether the features of all of the text but its last token are there, if any are wanted."""
        return not self.layers or state.known >= max(1, len(prefix) - 1)

    def _and_root(self, query: TreeQuery, leaves: Sequence[Leaf]) -> list[Leaf]:
        """With the root where the text has grown since: of what follows it more is known than when it was guessed."""
        state, trie = self._sequences[query.batch_slot], query.trie
        anew = self._has_grown(query) and self.ready(state, trie.tokens)
        if not anew or not trie.root.children or min(query.max_rows, self._deepest(query)) <= 0:
            return list(leaves)
        others = [leaf for leaf in leaves if leaf[0]]
        return [((), trie.root, 0.0), *others[: min(query.max_rows, self.max_leaves) - 1]]

    @property
    def _looks_back(self) -> bool:
        """Guesses depend on the token before as well."""
        raise NotImplementedError

    def _said_of(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of rows after some tokens: what the token adds to the logits, [P, D], and the log of the chance that the best
        guess is taken, [P]; None: nothing.  tokens: int64 [P]; hidden: [P, H], of the rows"""
        raise NotImplementedError

    def _ranked(self, queries: Sequence[RankQuery]) -> list[Guesses]:
        return self._each_after(queries) if self._looks_back else super()._ranked(queries)

    @torch.inference_mode()
    def after(self, asked: Sequence[tuple[RowAfter, Sequence[int]]]) -> list[list[list[Guess]]]:
        """The guesses of some rows of one text, each after some tokens. A head of confidence has learnt how often the
        target chooses the best one: of greedy guesses that is how likely it is."""
        counts = [len(tokens) for _, tokens in asked]
        tokens = sent(torch.tensor([token for _, some in asked for token in some]), self.device)
        hidden = torch.cat([row.hidden.expand(count, -1) for (row, _), count in zip(asked, counts, strict=True)])
        logits = torch.cat([row.logits.expand(count, -1) for (row, _), count in zip(asked, counts, strict=True)])
        bias, sure = self._said_of(tokens, hidden)
        if bias is not None:
            if logits.shape[1] != bias.shape[1]:
                assert self._vocabulary is not None, "only a draft vocabulary has other ids"
                bias = bias.new_zeros(logits.shape).index_copy_(1, self._vocabulary, bias)
            logits = logits + bias.float()
        params = asked[0][0].params
        coming = Fetched(sure) if sure is not None and params.greedy else None
        rows = [row for (row, _), count in zip(asked, counts, strict=True) for _ in range(count)]
        positions, paths = [row.position for row in rows], [row.path for row in rows]
        found: list[list[Guess]] = super()._ranked([RankQuery(logits, params, positions, paths=paths)])[0]
        if coming is not None:
            found = list(map(with_confidence, found, coming.wait().tolist()))  # they came before the guesses
        parts = iter(found)
        return [list(itertools.islice(parts, count)) for count in counts]

    def _timed(self, count: int) -> PathsQuery:
        """A forward of so many leaves."""
        return PathsQuery(self._sequences[0], [0] * timing.TIMED[0], [[]] * count, way=False)

    def _read_timed(self, query: PathsQuery) -> None:
        self.read_on([query])

    def time(self) -> None:
        """Finds the seconds of a forward of 1, 2, ... leaves."""
        length, rounds = timing.TIMED
        if self.layers:
            self.observe(np.zeros((length - 1, self._drafter.shape.feature_row), np.int16))
        some = [self._timed(count) for count in range(1, self.max_leaves + 1)]
        self._read_timed(some[0])  # the text too
        self.costs = tuple(
            timing.best_of(rounds, functools.partial(self._read_timed, one), self.device) for one in some
        )
        self.begin(0, SamplingParams())
        self.forwards = self.rows = 0
