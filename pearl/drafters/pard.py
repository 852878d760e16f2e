"""PARD: an ordinary causal language model that guesses K tokens in one forward (An et al. 2025, arXiv 2504.18583).

After the text stand K - 1 *mask rows*, all of one token that the checkpoint names (`config.pard_token`), at the next
positions; row j guesses token j + 1 without having seen the ones between. To the model they are rows as any others, so
one causal forward over text, path and mask rows is all there is. K: as many as it was trained for (`para_num`), or
asked for.

    text, path     read once, kept in the cache of the draft tree
    mask rows      read anew after every leaf, and given back after every forward

Knows: how a leaf is asked about. Refuses to know: the beam (`pearl.drafters.one_pass`), the cache, the model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pearl.core.params import SamplingParams
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.guesses import Guesses
from pearl.drafters.model import LeafReader
from pearl.drafters.one_pass import DraftedText, Leaf, OnePassSource, PathsQuery
from pearl.models import timing
from pearl.models.draft_model import LeavesQuery
from pearl.models.language_model import TREE_SLOTS


@dataclass
class SlottedText(DraftedText):
    """One sequence, and where the model keeps it."""

    batch_slot: int


class PardSource(OnePassSource):
    """Chains and trees of a PARD model."""

    def __init__(self, model: LeafReader, mask_token: int, depths: int, top_k: int = 0):
        """`mask_token`: of the mask rows. `depths`, `top_k`: see `OnePassSource`."""
        super().__init__(depths, top_k, model.max_length)
        self._model, self._mask_token = model, mask_token
        self.begin(0, SamplingParams())
        self.costs = self._time()

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._sequences[batch_slot] = SlottedText(params, batch_slot)
        if not continues:
            self._model.forget(batch_slot=batch_slot)

    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        if not queries:
            return []
        asked = [LeavesQuery(one.state.batch_slot, one.prefix, self._paths(one), self._mask_token) for one in queries]
        found = self._model.read_leaves_together(asked)
        self.forwards += 1
        self.rows += sum(map(len, found))
        logits = torch.cat(found)
        if self._mask_token < logits.shape[1]:  # no text has it, and a tied head's row of it is what mask rows are fed
            logits[:, self._mask_token] = -torch.inf
        return self.tables(queries, logits)

    def _leaves(self, query: TreeQuery) -> list[Leaf]:
        """As many as there are slots for: each takes its path and the mask rows."""
        kept, room = [], TREE_SLOTS
        for leaf in super()._leaves(query):
            room -= len(leaf[0]) + self.depths
            if room >= 0:
                kept.append(leaf)
        return kept

    def _paths(self, query: PathsQuery) -> list[tuple[int, ...]]:
        """The rows whose logits are wanted, each by the path that ends with it."""
        wanted = []
        for path in map(tuple, query.paths):
            wanted += [path[:end] for end in range(0 if query.way else len(path), len(path) + 1)]
            wanted += [path + (self._mask_token,) * more for more in range(1, self.depths)]
        return wanted

    def _time(self) -> tuple[float, ...]:
        """Seconds of a forward of 1, 2, ... leaves."""
        length, rounds = timing.TIMED
        text, state = [0] * min(length, self.longest - self.depths - 1), self._sequences[0]
        asked = [
            PathsQuery(state, text, [(leaf,) for leaf in range(n)], way=False) for n in range(1, self.max_leaves + 1)
        ]
        costs = tuple(timing.best_of(rounds, functools.partial(self.read_on, [one])) for one in asked)
        self.begin(0, SamplingParams())
        self.forwards = self.rows = 0
        return costs
