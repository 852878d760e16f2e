"""A model that drafts a tree: one forward extends several leaves, and carries guesses of the drafter's own.

    leaves of the trie, likeliest first           the end of the chain, and corrections where it is uncertain
    after each leaf, an n-gram guess or more      where the model's own pick agrees, the guess has been read already
    one forward over as many of them as pay
    the next tokens of each row, ranked           become nodes

All rows compete for the same forward by one currency: the chance that the target's walk will pass through the row. For
a leaf that is the joint probability of its path under q; for a guess it is its leaf's, times how often guesses like it
have come true. A row is taken while it adds more to what the forward yields per second than it costs
(`pearl.rows.leaf_costs`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pearl.model import Reader
from pearl.sampling import ranked
from pearl.sources import ModelSource, NgramSource
from pearl.trie import Node, Trie

CHILDREN = 6  # guesses after a row at most
FAINTEST = math.log(0.003)  # a path that is less likely is not offered, unless nothing else follows its parent
CROWD = 192  # leaves in waiting; beyond that the drafter rests
LONGEST = 4  # of an n-gram match


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

    def __init__(self, model: Reader, costs: Sequence[float] = (), own: NgramSource | None = None):
        """`costs[n - 1]`: seconds of a forward of n rows; empty: they are all the same. `own`: its own guesser."""
        super().__init__(model)
        self.costs = tuple(costs)
        self._own = own or NgramSource(LONGEST, 1)
        self._trust = _Trust()
        self.rows = self.own = self.confirmed = 0

    def extend(self, trie: Trie, most: int, deepest: int, fixed: bool = False) -> list[tuple[Node, Node]]:
        """One forward over the rows that pay, at most `most`, none at `deepest` below the root or beyond it.

        Grows the trie and returns the new nodes, each with its parent, parents first. `fixed`: take as many leaves as
        `most` says, whether they pay or not. An empty list: nothing is worth extending until the root moves.
        """
        deepest = min(deepest, self._model.max_length - len(trie.tokens) + 1)
        rows = self._choose(trie, most, deepest, fixed)
        if not rows:
            return []
        self.forwards += 1
        self.rows += len(rows)
        self.own += sum(row.node is None for row in rows)
        logits = self._model.read_leaves(trie.tokens, [row.path for row in rows])
        read: dict[tuple[int, ...], tuple[Node, float]] = {}  # the rows that are nodes, with their joint probability
        new: list[tuple[Node, Node]] = []
        positions = [len(trie.tokens) + len(row.path) for row in rows]
        guesses = ranked(logits, self._params, positions, CHILDREN)
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

    def _choose(self, trie: Trie, most: int, deepest: int, fixed: bool) -> list[_Row]:
        leaves = trie.leaves(deepest - 1)
        if len(leaves) > CROWD:
            return []
        order = itertools.count()
        heap = [(-logp, next(order), _Row(path, logp, node)) for path, node, logp in leaves]
        heapq.heapify(heap)
        rows: list[_Row] = []
        gain = 0.0  # rows of this forward that the walk is expected to pass through
        while heap and len(rows) < most:
            _, _, row = heapq.heappop(heap)
            use, before, after = math.exp(row.logp), self._cost(len(rows)), self._cost(len(rows) + 1)
            if rows and not fixed and (gain + use) / after < gain / before:
                break
            rows.append(row)
            gain += use
            if (guess := self._guess(trie, row, deepest)) is not None:
                heapq.heappush(heap, (-guess.logp, next(order), guess))
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

    def _cost(self, rows: int) -> float:
        return self.costs[min(rows, len(self.costs)) - 1] if self.costs and rows else 1.0
