"""Where guesses come from: one protocol; the drafter's loop knows no source by its name.

A source proposes a chain, or grows a tree, of tokens that may follow a text. Whether a guess is right is the target's
business alone, so a source may be anything: a smaller model, a search in the text so far, a constant. The simplest one
remembers nothing and says what follows a text (`propose`); `pearl.drafters.suffix` is one without weights. One that can
do more declares it by the attributes of `DraftSource`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pearl.core.logits.processing import LogitsProcessing
from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.core.trie import DRAFT, Node, Proposal, Trie

MAX_CHILDREN = 6  # guesses after a node at most, of a source that does not rank further
MIN_PATH_LOGP = math.log(0.003)  # a path that is less likely is not offered, unless it is its parent's first


class DraftGuess(NamedTuple):
    """One token of a chain."""

    token: int
    proposal: Proposal  # empty: nothing was drawn
    logp: float = 0.0  # how likely it is, of a source that knows it (see `trie.Node.logp`)
    origin: str = ""  # of a source that unites others: whose guess it is


# of a source, by the names of `DraftStats`
COUNTERS = ("forwards", "overtaken", "rows", "lookahead_rows", "lookahead_hits")

Chain = Sequence[tuple[int, Proposal] | DraftGuess]  # guesses, each after the one before it
Grown = list[tuple[Node, Node]]  # (parent, new node), parents first
# of some paths after a text: whether it is known by now to go along none of them, so that nobody asks what follows
OvertakenBy = Callable[[Sequence[tuple[int, ...]]], bool]


@dataclass(frozen=True)
class ChainQuery:
    """Asks for at most `room` guesses: what follows `path` after the tokens of a sequence."""

    batch_slot: int
    tokens: Sequence[int]
    path: tuple[int, ...]
    room: int
    processing: LogitsProcessing | None = None  # what the target does to its logits; None: nothing
    overtaken: OvertakenBy | None = None

    def processed(self, logits: Tensor) -> Tensor:
        """The drafter's, with what the target does to its own.  logits: [1, V]"""
        return self.processing.of_guesses(logits, self.tokens, [self.path]) if self.processing else logits

    def allowed(self, chain: Chain) -> Chain:
        """Of guesses that were made without logits those before the first that can't be right."""
        path = list(self.path)
        for place, (token, *_) in enumerate(chain if self.processing else ()):
            if self.processing and self.processing.forbids(self.tokens, path, token):
                return chain[:place]
            path.append(token)
        return chain


@dataclass(frozen=True)
class TreeQuery:
    """Asks for the trie of a sequence to be grown, by at most `max_rows` rows of a forward."""

    batch_slot: int
    trie: Trie
    max_rows: int
    max_depth: int  # below the root
    take_all: bool = False  # as many leaves as `max_rows` says, whether they pay or not
    processing: LogitsProcessing | None = None  # as in `ChainQuery`
    overtaken: OvertakenBy | None = None

    def chain(self) -> ChainQuery:
        """The same of a source that makes chains alone."""
        return ChainQuery(
            self.batch_slot, self.trie.tokens, (), min(self.max_rows, max(0, self.max_depth)), self.processing
        )

    def processed(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """As in `ChainQuery`, of rows after several paths.  logits: [R, V]"""
        return self.processing.of_guesses(logits, self.trie.tokens, paths) if self.processing else logits


@dataclass(frozen=True)
class RowsRead:
    """What a pass of the target has said of one sequence: rows of guesses that turned out wrong are among them."""

    contexts: Sequence[tuple[int, int]]  # of each row: the token before it, -1 if there is none, and its own
    logits: Tensor  # [R, V], of what follows each


class DraftSource:
    """What a source can do, and the defaults of one that can do no more than `propose`."""

    origin: str = DRAFT  # of its nodes, one of `pearl.core.trie`
    grows_trees: bool = False  # it has `extend`
    # one forward makes a tree by itself; else a chain, unless it extends several leaves
    makes_trees_alone: bool = False
    depths: int = 1  # tokens that such a forward guesses, one after the other
    layers: tuple[int, ...] = ()  # of the target, whose hidden states it wants in `observe`
    costs: tuple[float, ...] = ()  # seconds of a forward by its rows; empty: not known, or there is no model
    draws: bool = False  # its first guesses are drawn from the q that they carry, as rejection sampling wants them
    reads_rows: bool = False  # it wants to know what the target's rows say, in `read_rows`
    device: Any = None  # on which it wants hidden states, a torch.device

    # so far
    forwards: int = 0  # of its model
    overtaken: int = 0  # beside those: given up
    rows: int = 0  # that those have read
    lookahead_rows: int = 0  # of those: guesses that were read before the model had made them
    lookahead_hits: int = 0  # of those: what the model said too

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        """A new sequence takes a slot. Nothing of the last one there may be used unless it continues that."""

    def expect(self, batch_slot: int, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """What the target alone writes after `prompt`: for an instrument that has to know it."""

    def predict(self, batch_slot: int, tokens: Sequence[int]) -> None:
        """Tokens that are likely to occur in the sequence that has just begun there: an earlier version of it, say."""

    def is_sure(self, batch_slot: int, tokens: Sequence[int]) -> bool:
        """Whether it all but knows what follows, so that it is to be asked whatever its guesses were worth before."""
        return False

    def end(self, batch_slot: int) -> None:
        """The sequence there is over."""

    def remember(self, tokens: Sequence[int]) -> None:
        """The text of a sequence that is over: others may be like it."""

    def begin_round(self, forget: bool = False) -> None:
        """Modes are compared from here on: what a text leaves helps none of the same round. `forget`: what the texts of
        the last round have left helps none at all."""

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        """Up to `room` guesses, the first following `tokens`, for the sequence in slot 0.

        With each the q that it was drawn from (see `sampling.methods.propose`), empty if it was certain. An empty list:
        nothing worth guessing until the text changes.
        """
        raise NotImplementedError

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        """As `propose`, for each. A source that remembers its sequences, or has a model, answers all at once."""
        return [query.allowed(self.propose([*query.tokens, *query.path], query.room)) for query in queries]

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        """Grows each trie, all by one forward. An empty list: nothing is worth extending until the root moves."""
        raise NotImplementedError

    def observe(self, features: Features, batch_slot: int) -> None:
        """Hidden states of the positions that follow the ones seen so far, [positions, F]."""

    def unread(self, batch_slot: int, tokens: Sequence[int]) -> int:
        """How many of these tokens its next forward has to read before it can guess what follows."""
        return 0

    def read_rows(self, batch_slot: int, read: RowsRead) -> None:
        """What the last pass of the target has said. Only asked of a source in the target's process."""


def counters(source: DraftSource) -> dict[str, int]:
    """What a source has done so far."""
    return {name: getattr(source, name) for name in COUNTERS}


def as_guesses(chain: Chain, origin: str) -> list[DraftGuess]:
    """The guesses of a chain with all that they may leave out; `origin`: of the source that was asked."""
    guesses = (DraftGuess(*guess) for guess in chain)
    return [guess if guess.origin else guess._replace(origin=origin) for guess in guesses]


def grow_chain(query: TreeQuery, chain: Chain, origin: str) -> Grown:
    """The nodes of a chain below the root of a trie."""
    node, grown = query.trie.root, []
    for guess in as_guesses(chain, origin):
        there = guess.token in node.children
        below = query.trie.grow(node, *guess)
        assert below is not None, "a source extends the tree that it was given"
        if not there:
            grown.append((node, below))
        node = below
    return grown
