"""A draft model: a smaller causal language model with the target's tokenizer, one token a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pearl.core.sampling import SamplingParams, propose
from pearl.drafters.draft_source import Chain, Proposal
from pearl.models.draft_model import LeavesQuery


class LeafReader(Protocol):
    """What a source asks of its model; bits are of no account."""

    @property
    def max_length(self) -> int:
        """Of a sequence, in tokens."""

    @property
    def batch_slots(self) -> int:
        """How many sequences it can hold side by side."""

    def read(self, tokens: Sequence[int], keep: int) -> Tensor:
        """Logits [keep, V] of what follows each of the last `keep` tokens of the sequence in the first batch slot."""

    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[Tensor]:
        """For each query logits [len(paths), V] of what follows its tokens and each of its paths."""

    def forget(self, *, batch_slot: int) -> None:
        """Empties the cache of a batch slot."""


class ModelSource:
    """A smaller causal language model with the target's tokenizer, one token a forward."""

    def __init__(self, model: LeafReader):
        self._model = model
        self._params: dict[int, SamplingParams] = {0: SamplingParams()}
        self.forwards = 0

    def start(self, params: SamplingParams) -> None:
        self.begin(0, params)

    def begin(self, text: int, params: SamplingParams, continues: bool = False) -> None:
        self._params[text] = params
        if not continues:
            self._model.forget(batch_slot=text)

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        if len(text) > self._model.max_length:
            return []
        self.forwards += 1
        logits = self._model.read(text, keep=1)[0]
        return [propose(logits, self._params[0], position=len(text))]

    def propose_each(self, asked: Sequence[Chain]) -> list[list[tuple[int, Proposal]]]:
        fitting = [one for one in asked if len(one.tokens) + len(one.path) <= self._model.max_length]
        if not fitting:
            return [[] for _ in asked]
        self.forwards += 1
        read = self._model.read_leaves_together([LeavesQuery(one.text, one.tokens, [one.path]) for one in fitting])
        said = {
            one.text: [propose(logits[0], self._params[one.text], position=len(one.tokens) + len(one.path))]
            for one, logits in zip(fitting, read, strict=True)
        }
        return [said.get(one.text, []) for one in asked]
