"""Where guesses come from. One protocol, several sources; the drafter's loop knows none of them by name.

A source proposes a chain: one token or several that may follow a text. Whether a guess is right is the target's
business alone, so a source may be anything: a smaller model, a search in the text so far, a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pearl.messages import Features
from pearl.model import Reader, WantedLeaves
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


@dataclass(frozen=True)
class Chain:
    """Asks a source that holds several texts for at most `room` guesses: what follows `path` after the text."""

    text: int  # which of the source's texts
    tokens: Sequence[int]
    path: tuple[int, ...]
    room: int


@dataclass(frozen=True)
class Tree:
    """Asks it to extend a tree; see `TreeGrower.extend`."""

    text: int
    trie: Trie
    most: int
    deepest: int
    fixed: bool = False


@runtime_checkable
class Several(Protocol):
    """A source that remembers several texts, and guesses for all of them in one forward. One that remembers nothing
    needs no more than `DraftSource`: it is asked for one text after the other."""

    def begin(self, text: int, params: SamplingParams, continues: bool = False) -> None:
        """A new sequence begins where `text` was. Nothing of that may be used unless it continues it."""

    def propose_each(self, asked: Sequence[Chain]) -> list[list[tuple[int, Proposal]]]:
        """As `DraftSource.propose`, for each."""


@runtime_checkable
class SeveralTrees(Protocol):
    """The same of trees."""

    def extend_each(self, asked: Sequence[Tree]) -> list[list[tuple[Node, Node]]]:
        """As `TreeGrower.extend`, for each."""


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

    def observe(self, features: Features, text: int = 0) -> None:
        """Those of the positions that follow the ones seen so far, [positions, F]."""


class ModelSource:
    """A smaller causal language model with the target's tokenizer, one token a forward."""

    def __init__(self, model: Reader):
        self._model = model
        self._params: dict[int, SamplingParams] = {0: SamplingParams()}
        self.forwards = 0

    def start(self, params: SamplingParams) -> None:
        self.begin(0, params)

    def begin(self, text: int, params: SamplingParams, continues: bool = False) -> None:
        self._params[text] = params
        if not continues:
            self._model.forget(text=text)

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        if len(text) > self._model.max_length:
            return []
        self.forwards += 1
        logits = self._model.read(text, keep=1, padded=False)[0]
        return [propose(logits, self._params[0], position=len(text))]

    def propose_each(self, asked: Sequence[Chain]) -> list[list[tuple[int, Proposal]]]:
        fitting = [one for one in asked if len(one.tokens) + len(one.path) <= self._model.max_length]
        if not fitting:
            return [[] for _ in asked]
        self.forwards += 1
        read = self._model.read_leaves_together([WantedLeaves(one.text, one.tokens, [one.path]) for one in fitting])
        said = {
            one.text: [propose(logits[0], self._params[one.text], position=len(one.tokens) + len(one.path))]
            for one, logits in zip(fitting, read, strict=True)
        }
        return [said.get(one.text, []) for one in asked]


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
