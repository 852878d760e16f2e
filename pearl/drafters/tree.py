"""A model that drafts a tree: one forward extends several leaves, and looks ahead by guesses from the text.

    leaves of the trie, likeliest first             the end of the chain, and corrections where it is uncertain
    after each leaf, a guess from the text or more  where the model's own pick agrees, its row has been read already
    one forward over as many of them as pay
    the next tokens of each row, ranked             become nodes

What a row says is ranked further than is offered at once. A guess that is too unlikely while its parent is far off is
held back, and offered when the root has come near enough: by then the parent has become likely, and no other forward
asks for what may follow it.

All rows compete for the same forward by one currency: the chance that the target's walk will pass through the row. For
a leaf that is the joint probability of its path under q; for a guess from the text it is its leaf's, times how often
guesses like it have come true. As many of the likeliest rows are taken as make the forward yield most per second
(`pearl.models.batch_invariance.profile_leaves`).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import Ranked, RankedRow, RankQuery, ranked_together
from pearl.core.token_buckets import LEAVES, extended
from pearl.core.trie import Node
from pearl.drafters.draft_source import MIN_PATH_LOGP, Grown, TreeQuery
from pearl.drafters.model import LeafReader, ModelSource
from pearl.drafters.suffix import LENGTHS, Spot, SuffixIndex, length_class
from pearl.models.draft_model import LeavesQuery
from pearl.models.timing import best_of

RANKED = 16  # guesses after a node at most: of a model's misses one in eight is among the 7th to the 16th
_HIT_WEIGHT = 0.04  # of one more guess from the text in how often such guesses are right
FIRST_HIT_RATE = 0.3, 0.4, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8  # until something is known, see `LENGTHS`
_TIMED, _LEAVES_TIMED = 160, 3  # tokens of the sequences, and rows of each, at which a forward of several is timed


@dataclass(frozen=True)
class _DraftRow:
    """One row of a forward. `node` is None for a guess from the text, which the pick after its parent has yet to
    confirm."""

    path: tuple[int, ...]
    logp: float  # of the chance that the walk passes through it
    node: Node | None = None
    spot: Spot | None = None  # of a guess: where it ends in the text
    match: int = 0  # of how many tokens before it


class TreeSource(ModelSource):
    """A model as a source of trees; of chains as any `ModelSource`."""

    grows_trees = True
    max_open_leaves = 192  # with more it rests until the root moves
    least_leaf_logp = -math.inf  # of a leaf that it goes on from

    def __init__(
        self,
        model: LeafReader,
        costs: Sequence[float] = (),
        lookahead: SuffixIndex | None = None,
        several: tuple[float, float] = (0.0, 0.0),
    ):
        """`costs[n - 1]`: seconds of a forward of n rows; empty: they are all the same. `lookahead` makes the guesses
        that a forward carries along. `several`: see `profile_batches`."""
        super().__init__(model)
        self.costs, self._several = tuple(costs), several
        self._lookahead = lookahead or SuffixIndex()
        self._hit_rate = list(FIRST_HIT_RATE)  # of guesses from the text, by the length of their match
        self._held_back: dict[int, dict[Node, RankedRow]] = {0: {}}  # by batch slot: of nodes, what was not offered yet
        self._root: dict[int, Node] = {}  # by batch slot: below which all that is likely enough was offered
        assert len(self._hit_rate) == len(LENGTHS), "a rate for each class of lengths"

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        super().begin(batch_slot, params, continues)
        self._held_back[batch_slot] = {}

    def _forget(self, batch_slot: int) -> None:
        super()._forget(batch_slot)
        self._lookahead.begin(batch_slot)

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        """One forward over the rows that pay, of all tries; none is `max_depth` below its root or deeper."""
        offered = list(map(self._offer, queries))
        chosen = self._choose(queries)
        reading = [(one, rows) for one, rows in zip(queries, chosen, strict=True) if rows]
        if not reading:
            return offered
        leaves = [LeavesQuery(one.batch_slot, one.trie.tokens, [row.path for row in rows]) for one, rows in reading]
        read: list[Tensor] = []
        with self._unless_overtaken(reading[0][0] if len(reading) == 1 else None, leaves[0].paths):
            read = self._model.read_leaves_together(leaves)
        if not read:
            return offered
        self.forwards += 1
        self.rows += sum(map(len, chosen))
        self.lookahead_rows += sum(row.node is None for rows in chosen for row in rows)
        asked = []
        for (one, rows), logits in zip(reading, read, strict=True):
            positions = [len(one.trie.tokens) + len(row.path) for row in rows]
            paths = [row.path for row in rows]
            logits = one.processed(logits, paths)
            asked.append(RankQuery(logits, self._params[one.batch_slot], positions, paths=paths))
        guesses = iter(ranked_together(asked, RANKED))
        grown = [
            self._grow(one, rows, next(guesses)) if rows else [] for one, rows in zip(queries, chosen, strict=True)
        ]
        return [before + new for before, new in zip(offered, grown, strict=True)]

    def _offer(self, query: TreeQuery) -> Grown:
        """What was held back and has become likely enough, as the root has moved."""
        trie, held_back = query.trie, self._held_back[query.batch_slot]
        if self._root.get(query.batch_slot) is trie.root:
            return []
        self._root[query.batch_slot] = trie.root
        new: Grown = []
        kept: dict[Node, RankedRow] = {}
        stack = [(trie.root, 0.0)]
        while stack:
            node, joint = stack.pop()
            stack += [(child, joint + child.logp) for child in node.children.values()]
            if after := held_back.get(node):
                new += self._add_children(query, node, joint, after, kept, 0)
        self._held_back[query.batch_slot] = kept
        return new

    def _add_children(
        self, query: TreeQuery, node: Node, joint: float, after: RankedRow, held_back: dict[Node, RankedRow], least: int
    ) -> Grown:
        """The guesses after a node that are likely enough, `least` of them in any case; the others go to
        `held_back`."""
        new: Grown = []
        for place, (token, logp, proposal) in enumerate(after):
            if place >= least and joint + logp < MIN_PATH_LOGP:
                held_back[node] = after[place:]
                break
            child = query.trie.grow(node, token, proposal, logp, self.origin)
            assert child is not None, "a source extends the tree that it was given"
            new.append((node, child))
        return new

    def _grow(self, query: TreeQuery, rows: Sequence[_DraftRow], guesses: Ranked) -> Grown:
        """The nodes that come of the rows of one trie. `guesses`: after each of them"""
        read: dict[tuple[int, ...], tuple[Node, float]] = {}  # the rows that are nodes, with their joint probability
        new: Grown = []
        held_back = self._held_back[query.batch_slot]
        for row, after in zip(rows, guesses, strict=True):  # parents come before their children
            found = (row.node, row.logp) if row.node else self._confirm(row, read.get(row.path[:-1]))
            if found is None:
                continue
            node, joint = read[row.path] = found
            new += self._add_children(query, node, joint, after, held_back, 1)
        return new

    def _confirm(self, row: _DraftRow, parent: tuple[Node, float] | None) -> tuple[Node, float] | None:
        """The node of a guess from the text, now that the model's pick there is known; None if it was wrong."""
        if parent is None:
            return None
        above, joint = parent
        node = above.children.get(row.path[-1])
        first = node is not None and node is next(iter(above.children.values()))
        self.lookahead_hits += first
        rates, length = self._hit_rate, length_class(row.match)
        rates[length] = max(0.01, (1 - _HIT_WEIGHT) * rates[length] + _HIT_WEIGHT * first)
        return None if node is None else (node, joint + node.logp)

    def _choose(self, queries: Sequence[TreeQuery]) -> list[list[_DraftRow]]:
        """The rows that pay, of each trie."""
        order = itertools.count()
        deepest = [min(one.max_depth, self._model.max_length - len(one.trie.tokens) + 1) for one in queries]
        heap = []
        for number, one in enumerate(queries):
            leaves = one.trie.leaves(deepest[number] - 1, self.origin)
            if len(leaves) <= self.max_open_leaves:
                likely = [leaf for leaf in leaves if leaf[2] >= self.least_leaf_logp]
                heap += [(-logp, next(order), number, _DraftRow(path, logp, node)) for path, node, logp in likely]
        heapq.heapify(heap)
        taken: list[tuple[int, _DraftRow]] = []  # of which trie
        rows_of, gain = [0] * len(queries), 0.0  # gain: how many of the rows the walks are expected to pass through
        best, count = 0.0, 0  # gain a second, of so many of the rows
        while heap:
            _, _, number, row = heapq.heappop(heap)
            one = queries[number]
            if rows_of[number] >= one.max_rows:
                continue
            taken.append((number, row))
            rows_of[number] += 1
            gain += math.exp(row.logp)
            yields = gain / self._cost(len(taken), len(queries) - rows_of.count(0))
            if one.take_all or yields >= best:  # costs may jump at one row, and hardly grow at the next ones
                best, count = yields, len(taken)
            if (guess := self._look_ahead(one, row, deepest[number])) is not None:
                heapq.heappush(heap, (-guess.logp, next(order), number, guess))
        chosen: list[list[_DraftRow]] = [[] for _ in queries]
        for number, row in taken[:count]:
            chosen[number].append(row)
        return chosen

    def _look_ahead(self, query: TreeQuery, row: _DraftRow, deepest: int) -> _DraftRow | None:
        """The guess from the text of what follows a row."""
        if len(row.path) + 1 >= deepest:
            return None
        spot = row.spot or self._lookahead.place(query.batch_slot, query.trie.tokens, row.path)
        if (found := self._lookahead.next(spot)) is None:
            return None
        token, match, spot = found
        logp = row.logp + math.log(self._hit_rate[length_class(match)])
        return _DraftRow((*row.path, token), logp, None, spot, match)

    def _cost(self, rows: int, sequences: int) -> float:
        """Of a forward of so many rows, of so many sequences."""
        if not self.costs or not rows:
            return 1.0
        if sequences == 1 or not any(self._several):
            return extended(self.costs, rows)
        a_sequence, a_row = self._several
        return self.costs[0] + (sequences - 1) * a_sequence + (rows - sequences) * a_row


def profile_batches(reader: LeafReader, vocabulary: int, alone_s: float) -> tuple[float, float]:
    """Seconds that a forward takes longer for each sequence more, and for each row more than one a sequence.

    `alone_s`: of one row of one sequence.
    """
    slots = min(reader.max_sequences, LEAVES)
    assert slots > 1, "several sequences"
    tokens = [token % vocabulary for token in range(11, 11 + _TIMED)]
    found = []
    for leaves in (1, _LEAVES_TIMED):
        queries = [LeavesQuery(slot, tokens, [(token,) for token in range(leaves)]) for slot in range(slots)]
        found.append(best_of(5, functools.partial(reader.read_leaves_together, queries)))
    one, more = found
    return max(0.0, one - alone_s) / (slots - 1), max(0.0, more - one) / ((_LEAVES_TIMED - 1) * slots)
