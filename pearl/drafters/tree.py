"""A model that drafts a tree: one forward extends several leaves, and carries guesses of the drafter's own.

    leaves of the trie, likeliest first           the end of the chain, and corrections where it is uncertain
    after each leaf, an n-gram guess or more      where the model's own pick agrees, the guess has been read already
    one forward over as many of them as pay
    the next tokens of each row, ranked           become nodes

All rows compete for the same forward by one currency: the chance that the target's walk will pass through the row. For
a leaf that is the joint probability of its path under q; for a guess it is its leaf's, times how often guesses like it
have come true. A row is taken while it adds more to what the forward yields per second than it costs
(`pearl.models.batch_invariance.profile_leaves`).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pearl.core.sampling import ranked
from pearl.core.token_buckets import LEAVES, extended
from pearl.core.trie import Node, Trie
from pearl.drafters.draft_source import Tree
from pearl.drafters.model import LeafReader, ModelSource
from pearl.drafters.ngram import NgramSource
from pearl.models.draft_model import LeavesQuery
from pearl.models.timing import best_of

CHILDREN = 6  # guesses after a row at most
FAINTEST = math.log(0.003)  # a path that is less likely is not offered, unless nothing else follows its parent
CROWD = 192  # leaves in waiting; beyond that the drafter rests
LONGEST = 4  # of an n-gram match
_TIMED, _LEAVES_TIMED = 160, 3  # tokens of the texts, and rows of each, at which a forward of several is timed


@dataclass(frozen=True)
class _Row:
    """One row of a forward. `node` is None for a guess of our own, which `parent`'s pick has yet to confirm."""

    path: tuple[int, ...]
    logp: float  # of the chance that the walk passes through it
    node: Node | None = None
    guesses: tuple[int, ...] = ()  # n-gram guesses that may follow
    match: int = 0  # length of the n-gram match


@dataclass
class _Trust:
    """How often a first n-gram guess came true, by the length of its match."""

    right: list[float] = field(default_factory=lambda: [0.01, 0.2, 0.4, 0.6, 0.7])

    def __getitem__(self, match: int) -> float:
        return self.right[match]

    def learn(self, match: int, right: bool) -> None:
        self.right[match] = max(0.01, 0.96 * self.right[match] + 0.04 * right)


class TreeSource(ModelSource):
    """A model as a source of trees; of chains as any `ModelSource`."""

    whole = False

    def __init__(
        self,
        model: LeafReader,
        costs: Sequence[float] = (),
        own: NgramSource | None = None,
        several: tuple[float, float] = (0.0, 0.0),
    ):
        """`costs[n - 1]`: seconds of a forward of n rows; empty: they are all the same. `own`: its own guesser.
        `several`: see `profile_batches`."""
        super().__init__(model)
        self.costs, self._several = tuple(costs), several
        self._own = own or NgramSource(LONGEST, 1)
        self._trust = _Trust()
        self.rows = self.own = self.confirmed = 0

    def extend(self, trie: Trie, most: int, deepest: int, fixed: bool = False) -> list[tuple[Node, Node]]:
        """One forward over the rows that pay, at most `most`, none at `deepest` below the root or beyond it.

        Grows the trie and returns the new nodes, each with its parent, parents first. `fixed`: take as many leaves as
        `most` says, whether they pay or not. An empty list: nothing is worth extending until the root moves.
        """
        return self.extend_each([Tree(0, trie, most, deepest, fixed)])[0]

    def extend_each(self, asked: Sequence[Tree]) -> list[list[tuple[Node, Node]]]:
        """The same of several tries, whose rows compete for one forward; at most `most` for each."""
        chosen = self._choose(asked)
        reading = [(one, rows) for one, rows in zip(asked, chosen, strict=True) if rows]
        if not reading:
            return [[] for _ in asked]
        self.forwards += 1
        self.rows += sum(map(len, chosen))
        self.own += sum(row.node is None for rows in chosen for row in rows)
        wanted = [LeavesQuery(one.text, one.trie.tokens, [row.path for row in rows]) for one, rows in reading]
        read = iter(self._model.read_leaves_together(wanted))
        return [self._grow(one, rows, next(read)) if rows else [] for one, rows in zip(asked, chosen, strict=True)]

    def _grow(self, one: Tree, rows: Sequence[_Row], logits: Tensor) -> list[tuple[Node, Node]]:
        """The nodes that come of the rows of one trie. logits: [rows, V]"""
        trie = one.trie
        read: dict[tuple[int, ...], tuple[Node, float]] = {}  # the rows that are nodes, with their joint probability
        new: list[tuple[Node, Node]] = []
        positions = [len(trie.tokens) + len(row.path) for row in rows]
        guesses = ranked(logits, self._params[one.text], positions, CHILDREN)
        for row, after in zip(rows, guesses, strict=True):  # parents come before their children
            found = (row.node, row.logp) if row.node else self._confirm(row, read.get(row.path[:-1]))
            if found is None:
                continue
            node, joint = read[row.path] = found
            for rank, (token, logp, proposal) in enumerate(after):
                if rank and joint + logp < FAINTEST:
                    break
                child = trie.grow(node, token, proposal, logp)
                assert child is not None, "a source extends the tree that it was given"
                new.append((node, child))
        return new

    def _confirm(self, row: _Row, parent: tuple[Node, float] | None) -> tuple[Node, float] | None:
        """The node of a guess of our own, now that its parent's pick is known; None if it was wrong."""
        if parent is None:
            return None
        above, joint = parent
        node = above.children.get(row.path[-1])
        first = node is not None and node is next(iter(above.children.values()))
        self.confirmed += first
        self._trust.learn(row.match, first)
        return None if node is None else (node, joint + node.logp)

    def _choose(self, asked: Sequence[Tree]) -> list[list[_Row]]:
        """The rows of each, of all that are asked for those that pay."""
        order = itertools.count()
        deepest = [min(one.deepest, self._model.max_length - len(one.trie.tokens) + 1) for one in asked]
        heap = []
        for number, one in enumerate(asked):
            leaves = one.trie.leaves(deepest[number] - 1)
            if len(leaves) <= CROWD:
                heap += [(-logp, next(order), number, _Row(path, logp, node)) for path, node, logp in leaves]
        heapq.heapify(heap)
        rows: list[list[_Row]] = [[] for _ in asked]
        count, gain = 0, 0.0  # rows of this forward, and how many of them the walks are expected to pass through
        texts = 0
        while heap:
            _, _, number, row = heapq.heappop(heap)
            one, mine = asked[number], rows[number]
            if len(mine) >= one.most:
                continue
            use, begun = math.exp(row.logp), texts + (not mine)
            before, after = self._cost(count, texts), self._cost(count + 1, begun)
            if count and not one.fixed and (gain + use) / after < gain / before:
                break
            mine.append(row)
            count, gain, texts = count + 1, gain + use, begun
            if (guess := self._guess(one.trie, row, deepest[number])) is not None:
                heapq.heappush(heap, (-guess.logp, next(order), number, guess))
        return rows

    def _guess(self, trie: Trie, row: _Row, deepest: int) -> _Row | None:
        """Our own guess of what follows a row."""
        guesses, match = row.guesses, row.match
        if row.node:
            match, guesses = self._own.look_up([*trie.tokens, *row.path])
        if not guesses or len(row.path) + 1 >= deepest:
            return None
        logp = row.logp + math.log(self._trust[match])
        return _Row((*row.path, guesses[0]), logp, None, guesses[1:], match)

    def _cost(self, rows: int, texts: int) -> float:
        """Of a forward of so many rows, of so many texts."""
        if not self.costs or not rows:
            return 1.0
        if texts == 1 or not any(self._several):
            return extended(self.costs, rows)
        a_text, a_row = self._several
        return self.costs[0] + (texts - 1) * a_text + (rows - texts) * a_row


def profile_batches(reader: LeafReader, vocabulary: int, alone_s: float) -> tuple[float, float]:
    """Seconds that a forward takes longer for each text more, and for each row more than one a text.

    `alone_s`: of one row of one text.
    """
    texts = min(reader.batch_slots, LEAVES)
    assert texts > 1, "several texts"
    tokens = [token % vocabulary for token in range(11, 11 + _TIMED)]
    found = []
    for leaves in (1, _LEAVES_TIMED):
        wanted = [LeavesQuery(text, tokens, [(token,) for token in range(leaves)]) for text in range(texts)]
        found.append(best_of(5, functools.partial(reader.read_leaves_together, wanted)))
    one, more = found
    return max(0.0, one - alone_s) / (texts - 1), max(0.0, more - one) / ((_LEAVES_TIMED - 1) * texts)
