"""A draft model: a smaller causal language model with the target's tokenizer, one token a forward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import propose, propose_together
from pearl.drafters.draft_source import Chain, ChainQuery, DraftSource, TreeQuery
from pearl.models.draft_model import LeavesQuery, Overtaken


class LeafReader(Protocol):
    """What a source asks of its model; bits are of no account."""

    overtaken: Callable[[], bool] | None  # see `DraftModel.overtaken`; one that never gives up need not ask

    @property
    def max_length(self) -> int:
        """Of a sequence, in tokens."""

    @property
    def max_sequences(self) -> int:
        """How many sequences it can hold side by side."""

    def read(self, tokens: Sequence[int], keep: int) -> Tensor:
        """Logits [keep, V] of what follows each of the last `keep` tokens of the sequence in the first batch slot."""

    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[Tensor]:
        """For each query logits [len(paths), V] of what follows its tokens and each of its paths."""

    def forget(self, *, batch_slot: int) -> object:
        """Empties the cache of a batch slot."""

    def end(self, *, batch_slot: int) -> object:
        """The sequence in a batch slot is over; it may go on."""


class ModelSource(DraftSource):
    """One guess a forward. A sequence that is alone is read the plain way, several as leaves of one forward."""

    draws = True

    def __init__(self, model: LeafReader):
        self._model = model
        self._params: dict[int, SamplingParams] = {0: SamplingParams()}
        self._live: set[int] = set()  # batch slots
        self._batched = False  # a sequence under way has been beside another

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._params[batch_slot] = params
        self._live.add(batch_slot)
        self._batched |= batch_slot > 0
        if not continues:
            self._forget(batch_slot)

    def _forget(self, batch_slot: int) -> None:
        """The sequence that begins has nothing of the one before it."""
        self._model.forget(batch_slot=batch_slot)

    def end(self, batch_slot: int) -> None:
        self._model.end(batch_slot=batch_slot)
        self._live.discard(batch_slot)
        self._batched &= bool(self._live)

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return self._propose_alone(ChainQuery(0, tokens, (), room))

    def _propose_alone(self, query: ChainQuery) -> Chain:
        tokens = [*query.tokens, *query.path]
        if len(tokens) > self._model.max_length:
            return []
        with self._unless_overtaken(query, [query.path]):
            q = query.processed(self._model.read(tokens, keep=1))[0]
            self.forwards += 1
            self.rows += 1
            return [propose(q, self._params[0], position=len(tokens))]
        return []

    @contextlib.contextmanager
    def _unless_overtaken(
        self, query: ChainQuery | TreeQuery | None, paths: Sequence[tuple[int, ...]]
    ) -> Iterator[None]:
        """For a forward that says what follows these paths. What is in here ends where that is given up; None: it can't
        be, as it is of several sequences."""
        asked = query.overtaken if query else None
        self._model.overtaken = asked and functools.partial(asked, paths)
        try:
            yield
        except Overtaken:
            self.overtaken += 1
        finally:
            self._model.overtaken = None

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        if not self._batched:
            return list(map(self._propose_alone, queries))
        fitting = [one for one in queries if len(one.tokens) + len(one.path) <= self._model.max_length]
        if not fitting:
            return [[] for _ in queries]
        self.forwards += 1
        self.rows += len(fitting)
        leaves = [LeavesQuery(one.batch_slot, one.tokens, [one.path]) for one in fitting]
        asked = [
            (one.processed(q)[0], self._params[one.batch_slot], len(one.tokens) + len(one.path))
            for one, q in zip(fitting, self._model.read_leaves_together(leaves), strict=True)
        ]
        proposed = {one.batch_slot: [guess] for one, guess in zip(fitting, propose_together(asked), strict=True)}
        return [proposed.get(one.batch_slot, []) for one in queries]
