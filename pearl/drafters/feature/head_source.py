"""EAGLE-3 as a draft source: chains, and trees that one forward grows below several leaves (EAGLE-2, Li et al. 2024).

The target's features come with its verdicts. Until the first have come there is nothing to draft from; beyond what the
target has read, drafting goes on from the network's own hidden state, in one process and in two alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import ranked
from pearl.core.token_buckets import LEAVES
from pearl.drafters.draft_source import MAX_CHILDREN, MIN_PATH_LOGP, Chain, ChainQuery, Grown, TreeQuery
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.guesses import Guesses
from pearl.drafters.tree import TreeSource
from pearl.models import timing
from pearl.models.draft_model import LeavesQuery
from pearl.models.static_shapes.network import NetworkForward


class HeadSource(TreeSource):
    """An autoregressive network. A row needs the hidden state of the one before it, so no n-gram guess rides along."""

    origin = "feature"
    chain_length = 5  # of `guess`
    least_leaf_logp = MIN_PATH_LOGP  # what is less likely is not offered, so it need not be gone on from

    def __init__(self, reader: HeadReader):
        super().__init__(reader)
        self._reader = reader
        self.layers, self.device = reader.drafter.shape.features, reader.drafter.device
        self.begin(0, SamplingParams())
        self.time()

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self._reader.max_length

    @property
    def vocabulary(self) -> torch.Tensor:
        """The target's ids of the tokens that can be drafted, int64 [D]."""
        return self._reader.drafter.vocabulary

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        super().begin(batch_slot, params, continues)
        self._reader.begin(batch_slot, continues)

    def _forget(self, batch_slot: int) -> None:
        """The reader does, as it begins."""

    def guess(self, prefix: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Guesses]:
        """For each path after the prefix, guesses of `chain_length` depths, each after the likeliest ones before it."""
        found: list[Guesses] = []
        for path in paths:
            chain, tables = list(path), []
            for _ in range(self.chain_length):
                (logits,) = self._reader.read_leaves_together([LeavesQuery(0, prefix, [tuple(chain)])])
                tables += ranked(logits, self._params[0], [len(prefix) + len(chain)], MAX_CHILDREN)
                chain.append(tables[-1][0][0])
            found.append(tables)
        return found

    def observe(self, features: Features, batch_slot: int = 0) -> None:
        self._reader.observe(features, batch_slot)

    def unread(self, batch_slot: int, tokens: Sequence[int]) -> int:
        return self._reader.unread(batch_slot)

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        return self._where_ready(queries, super().propose_batch)

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        return self._where_ready(queries, super().extend)

    def _where_ready(self, queries: Sequence[Any], answer: Callable[[Any], list[Any]]) -> list[Any]:
        """The answers; an empty one for a sequence that has no row to draft from yet."""
        ready = [query for query in queries if self._reader.ready(query.batch_slot)]
        answers = dict(zip((query.batch_slot for query in ready), answer(ready) if ready else [], strict=True))
        return [answers.get(query.batch_slot, []) for query in queries]

    def _look_ahead(self, query: TreeQuery, row: object, deepest: int) -> None:
        return None

    @property
    def forward(self) -> NetworkForward:
        return self._reader.forward

    def probe(self, seed: int) -> None:
        """Some forwards over a text of that number."""
        generator, (length, _), shape = torch.Generator().manual_seed(seed), timing.TIMED, self._reader.drafter.shape
        text = torch.randint(shape.known or 2, (length,), generator=generator).tolist()
        self.begin(0, SamplingParams())
        features = torch.randn(length - 1, shape.feature_row, generator=generator)
        self.observe(features.to(torch.bfloat16).view(torch.int16).numpy())
        for end in range(length - 3, length + 1):
            for rows in range(1, LEAVES + 1):
                self._reader.read_leaves_together([LeavesQuery(0, text[:end], [(token,) for token in range(rows)])])
                self._reader.forget_drafted(0)
        self.begin(0, SamplingParams())

    def time(self) -> None:
        """Finds the seconds of a forward of 1, 2, ... rows."""
        length, rounds = timing.TIMED
        text = [0] * length
        self.observe(np.zeros((length - 1, self._reader.drafter.shape.feature_row), np.int16))

        def read(rows: int) -> None:
            self._reader.forget_drafted(0)
            self._reader.read_leaves_together([LeavesQuery(0, text, [(token,) for token in range(rows)])])

        read(1)
        counts = range(1, LEAVES + 1)
        self.costs = tuple(timing.best_of(rounds, functools.partial(read, rows), self.device) for rows in counts)
        self.begin(0, SamplingParams())
