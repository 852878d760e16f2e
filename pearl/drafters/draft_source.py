"""Where guesses come from. One protocol, several sources; the drafter's loop knows none of them by name.

A source proposes a chain: one token or several that may follow a text. Whether a guess is right is the target's
business alone, so a source may be anything: a smaller model, a search in the text so far, a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pearl.core.messages import Features
from pearl.core.sampling import SamplingParams
from pearl.core.trie import Node, Trie

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
    """A source that can grow a tree too (`pearl.drafters.tree`)."""

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
