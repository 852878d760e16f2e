"""Where guesses come from. One protocol, several sources; the drafter's loop knows none of them by name.

A source proposes a chain: one token or several that may follow a text. Whether a guess is right is the target's
business alone, so a source may be anything: a smaller model, a search in the text so far, a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pearl.model import Reader
from pearl.sampling import SamplingParams, propose
from pearl.trie import Node, Trie

Proposal = tuple[tuple[int, float], ...]


class DraftSource(Protocol):
    forwards: int  # model forwards so far, a fact for the records

    def start(self, params: SamplingParams) -> None:
        """A new sequence begins; nothing of the last one may be used."""

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        """Up to `room` guesses, each following the one before it, the first following `text`.

        With each the q that it was drawn from (see `sampling.propose`), empty if it was certain. An empty list: nothing
        worth guessing until the text changes.
        """


@runtime_checkable
class Continuing(Protocol):
    """A source that remembers what it has read."""

    def go_on(self, params: SamplingParams) -> None:
        """As `start`, but the new sequence continues the last one: what was read of it may be used."""


@runtime_checkable
class TreeGrower(Protocol):
    """A source that can grow a tree too (`pearl.beam`)."""

    costs: tuple[float, ...]  # seconds of a forward by its rows
    whole: bool  # whether one forward makes a tree by itself; else a chain, unless several leaves are extended
    rows: int  # read so far
    own: int  # of those: guesses of its own
    confirmed: int  # of those: what its model said too

    def extend(self, trie: Trie, most: int, deepest: int, fixed: bool = False) -> list[tuple[Node, Node]]:
        """Grows the trie by one forward of at most `most` rows. Returns the new nodes, each with its parent."""


@runtime_checkable
class Observer(Protocol):
    """A source that drafts from what the target's layers say (`pearl.feature`)."""

    layers: tuple[int, ...]  # whose hidden states it wants

    def observe(self, features: np.ndarray) -> None:
        """The features of the positions that follow those seen so far: int16 [positions, F], bits of bfloat16."""


class ModelSource:
    """A smaller causal language model with the target's tokenizer, one token a forward."""

    def __init__(self, model: Reader):
        self._model = model
        self._params = SamplingParams()
        self.forwards = 0

    def start(self, params: SamplingParams) -> None:
        self._model.forget()
        self.go_on(params)

    def go_on(self, params: SamplingParams) -> None:
        self._params = params

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        if len(text) > self._model.max_length:
            return []
        self.forwards += 1
        logits = self._model.read(text, keep=1, padded=False)[0]
        return [propose(logits, self._params, position=len(text))]


class NgramSource:
    """Prompt lookup (Saxena 2023): what followed the last few tokens the last time they occurred. No weights."""

    forwards = 0

    def __init__(self, longest: int = 4, shortest: int = 2, most: int = 8):
        """Matches at most `longest` of the last tokens, at least `shortest`; proposes at most `most` at a time."""
        self._longest, self._shortest, self._most = longest, shortest, most

    def start(self, params: SamplingParams) -> None:
        pass

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        _, guesses = self.look_up(text)
        return [(token, ()) for token in guesses[:room]]

    def look_up(self, text: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """How many of the last tokens occurred before, and what followed them then; (0, ()) if too few did."""
        best, where = self._shortest - 1, 0
        for end in range(len(text) - 1, 0, -1):  # the latest occurrence of the longest match
            if text[end - 1] == text[-1] and (size := self._match(text, end)) > best:
                best, where = size, end
                if size == self._longest:
                    break
        return (best, tuple(text[where : where + self._most])) if where else (0, ())

    def _match(self, text: Sequence[int], end: int) -> int:
        """How many tokens before `end` are those before the end of the text, up to `longest`."""
        size = 1
        while size < min(self._longest, end) and text[end - 1 - size] == text[-1 - size]:
            size += 1
        return size
