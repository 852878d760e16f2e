"""A source whose one forward gives the distributions of the next K tokens: which leaves it reads, what grows of them.

The K distributions are marginals: none knows which token was picked before it. A beam takes the likeliest paths by the
product of their tokens' chances. Where the text has grown since the last time, the way to a leaf is guessed again.

Knows: tries, chains, paths. Refuses to know: networks and how they are read (`read_on` of who goes on from here).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pearl.core.logits.processing import LogitsProcessing
from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import RankQuery, ranked_together
from pearl.core.trie import Node
from pearl.drafters.draft_source import (
    MAX_CHILDREN,
    MIN_PATH_LOGP,
    Chain,
    ChainQuery,
    DraftSource,
    Grown,
    TreeQuery,
)
from pearl.drafters.guesses import (
    Beam,
    Guess,
    Guesses,
    RowAfter,
    RowGuesses,
    best_chain,
    grown_beams,
    grown_once,
    guesses_after_each,
    joint_logp,
)
from pearl.models.reduced_head import scatter_vocabulary

TOP_K = 8  # paths that survive a depth

Leaf = tuple[tuple[int, ...], Node, float]  # path, node, joint log-probability


@dataclass
class DraftedText:
    """What is known of one sequence."""

    params: SamplingParams
    guessed: int = field(default=0, kw_only=True)  # length of the sequence when the tree was last extended


@dataclass(frozen=True)
class PathsQuery:
    """Asks a forward about one sequence: what follows `prefix`, which is known for certain, and each path.

    `state`: a `DraftedText`; `text`: the committed tokens; `processing`: what the target does to its logits; `way`: ask
    also what follows the prefix and each node on the way to the end of a path."""

    state: Any
    prefix: Sequence[int]
    paths: Sequence[Sequence[int]]
    text: Sequence[int] = ()
    processing: LogitsProcessing | None = None
    way: bool = True

    def rows(self, path: Sequence[int], depths: int) -> int:
        """Rows of logits after a path of one of `paths`."""
        return (len(path) if self.way else 0) + depths

    def processed(self, logits: Tensor, depths: Callable[[Sequence[int]], int]) -> Tensor:
        """As the target does it to its own, up to what is not known: guesses between the end of a path and a slot.

        logits: [rows, V], for each path those of what follows the prefix, each node of the path, and slots: together as
        many after the end of a path as `depths` says of it.
        """
        if not self.processing:
            return logits
        said = [
            [*self.prefix, *path[:end]]
            for path in self.paths
            for end in range(0 if self.way else len(path), len(path) + 1)
            for _ in range(depths(path) if end == len(path) else 1)
        ]
        return self.processing.of_guesses(logits, self.text, [one[len(self.text) :] for one in said])


class OnePassSource(DraftSource):
    """Chains and trees of one forward."""

    grows_trees = makes_trees_alone = draws = True
    max_open_leaves = 128  # with more it rests until the root moves
    max_leaves = 4  # extended by one forward

    def __init__(self, depths: int, top_k: int = 0, longest: int = 1 << 20):
        """`depths`: K, guesses that follow one another in one forward. `top_k`: paths kept at each depth, 0: `TOP_K`; 1
        makes chains. `longest`: tokens of a sequence."""
        self.depths, self._top_k, self.longest = depths, top_k or TOP_K, longest
        self._vocabulary: Tensor | None = None  # int64 [D], the target's ids of what can be drafted; None: all
        self._ids: list[int] = []  # the same on the host
        self._size = 0  # one more than the last of them
        self._sequences: dict[int, Any] = {}  # `DraftedText` by batch slot

    def of_vocabulary(self, vocabulary: Tensor | None) -> None:
        """Logits are over these tokens of the target's, int64 [D]; None: over all."""
        self._vocabulary, self._ids = vocabulary, [] if vocabulary is None else vocabulary.tolist()
        self._size = 1 + max(self._ids, default=0)

    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        """One forward. For each path of each sequence: what follows each node on its way, the prefix's last token
        first, and guesses of K depths after its end."""
        raise NotImplementedError

    @property
    def chain_length(self) -> int:
        """Guesses that follow one another in what `guess` returns."""
        return self.depths

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's ids of the tokens that can be drafted, int64 [D]; None: all."""
        return self._vocabulary

    def guess(self, prefix: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Guesses]:
        """For each path after the prefix, guesses of all depths, each after the likeliest one before it."""
        found: list[Guesses] = []
        if not all(map(self.guesses_after, paths)):
            return [self.guess(prefix, [path])[0] if self.guesses_after(path) else [] for path in paths]
        read = self.read_on([PathsQuery(self._sequences[0], prefix, paths, way=False)])[0]
        for path, (_, table) in zip(paths, read, strict=True):
            if any(isinstance(row, RowAfter) for row in table):
                token, known = [*prefix, *path][-1], []
                for row in table:
                    known += guesses_after_each([(row, [token])])[0]
                    token = known[-1][0][0]
                table = known
            found.append(table)
        return found

    def tables(
        self, queries: Sequence[PathsQuery], logits: Tensor, hidden: Tensor | None = None
    ) -> list[list[tuple[Guesses, Guesses]]]:
        """What `read_on` returns, of logits as `PathsQuery.processed` takes them, one query after the other.

        logits: [R, D], float32, over the draft vocabulary; hidden: [R, H], for `after`."""
        logits = self._processed(queries, logits)
        found: list[list[tuple[Guesses, Guesses]]] = []
        groups, asked, first = [], [], 0
        for own, group in itertools.groupby(queries, key=lambda one: one.state.params):
            some = list(group)
            ends = [  # places after the prefix: on the way along a path, and of the slots after its end
                (one, path, place)
                for one in some
                for path in one.paths
                for place in range(0 if one.way else len(path), len(path) + self.guesses_after(path))
            ]
            positions = [len(one.prefix) + place for one, _, place in ends]
            paths = [path[:place] for _, path, place in ends]
            rows = slice(first, first + len(positions))
            asked.append(RankQuery(logits[rows], own, positions, None if hidden is None else hidden[rows], paths))
            first = rows.stop
            groups.append(some)
        for some, guesses in zip(groups, self._ranked(asked), strict=True):
            at = 0
            for one in some:
                found.append([])
                for path in one.paths:
                    depths = self.guesses_after(path)
                    last = at + one.rows(path, depths)
                    found[-1].append((guesses[at : last - depths], guesses[last - depths : last]))
                    at = last
        return found

    def _processed(self, queries: Sequence[PathsQuery], logits: Tensor) -> Tensor:
        """With what the target does to its own; over the target's vocabulary, if there is anything.  logits: [R, D]"""
        if not any(one.processing for one in queries):
            return logits
        rows = [sum(one.rows(path, self.guesses_after(path)) for path in one.paths) for one in queries]
        parts = self._of_target(logits).split(rows)
        return torch.cat([one.processed(part, self.guesses_after) for one, part in zip(queries, parts, strict=True)])

    def _of_target(self, logits: Tensor) -> Tensor:
        """From the draft vocabulary to the target's token ids; what is there already stays.  logits: [R, D]"""
        if self._vocabulary is None or logits.shape[1] == self._size:
            return logits
        return scatter_vocabulary(logits, self._vocabulary, self._size)

    def _ranked(self, queries: Sequence[RankQuery]) -> list[Guesses]:
        """Of logits over the draft vocabulary or the target's; positions: of the token that each row guesses. The host
        waits for a GPU once."""
        own = [self._is_own(one) for one in queries]
        # noise and filters are functions of the target's own token ids
        asked = [
            one if mine else one._replace(logits=self._of_target(one.logits))
            for one, mine in zip(queries, own, strict=True)
        ]
        found: list[Guesses] = list(ranked_together(asked, MAX_CHILDREN))
        return [
            [[(self._ids[at], q, proposal) for at, q, proposal in row] for row in rows] if mine else rows
            for rows, mine in zip(found, own, strict=True)
        ]

    def _is_own(self, query: RankQuery) -> bool:
        """Whether its guesses are numbered as the draft vocabulary is."""
        return bool(self._ids) and query.params.greedy and query.logits.shape[1] == len(self._ids)

    def _each_after(self, queries: Sequence[RankQuery]) -> list[Guesses]:
        """`_ranked` where guesses depend on the token before as well."""
        found: list[Guesses] = []
        for one in queries:
            assert one.hidden is not None, "guesses that depend on the token before need them"
            paths = one.paths or [()] * len(one.positions)
            rows = zip(one.logits, one.hidden, one.positions, paths, strict=True)
            found.append([RowAfter(self, row, hidden, at, path, one.params) for row, hidden, at, path in rows])
        return found

    def after(self, asked: Sequence[tuple[RowAfter, Sequence[int]]]) -> list[list[list[Guess]]]:
        """The guesses of some rows of one text, each after some tokens."""
        raise NotImplementedError

    def known(self, state: Any, tokens: Sequence[int]) -> int:
        """How many of `tokens` are the prefix; what is beyond counts as a path."""
        return len(tokens)

    def guesses_after(self, path: Sequence[int]) -> int:
        """How many tokens are guessed after the end of a path; 0: it is not read."""
        return self.depths

    def ready(self, state: Any, prefix: Sequence[int]) -> bool:
        """Whether all is there that a forward after this prefix reads."""
        return True

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        """The best guess of every depth, one after the other."""
        return self.propose_batch([ChainQuery(0, tokens, (), room)])[0]

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        """The same after several sequences, in one forward."""
        wanted: dict[int, PathsQuery] = {}
        for one in queries:
            state, tokens = self._sequences[one.batch_slot], [*one.tokens, *one.path]
            prefix = self.known(state, tokens)
            fits = len(tokens) + self.depths <= self.longest and self.guesses_after(tokens[prefix:]) > 0
            if fits and self.ready(state, tokens[:prefix]):
                query = PathsQuery(state, tokens[:prefix], [tokens[prefix:]], one.tokens, one.processing, way=False)
                wanted[one.batch_slot] = query
        found = dict(zip(wanted, self.read_on(list(wanted.values())), strict=True))
        return [
            best_chain(found[one.batch_slot][0][1], [*one.tokens, *one.path][-1])[: one.room]
            if one.batch_slot in found
            else []
            for one in queries
        ]

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        """Grows the tries below their likeliest leaves.

        Where the text has grown since the last time, the way to these leaves is gone again: the target has said more,
        so what follows each node on the way is known better than when it was first guessed.
        """
        leaves = {one.batch_slot: self._leaves(one) for one in queries}
        reading = [one for one in queries if leaves[one.batch_slot]]
        wanted = [
            PathsQuery(
                self._sequences[one.batch_slot],
                one.trie.tokens,
                [list(path) for path, _, _ in leaves[one.batch_slot]],
                one.trie.tokens,
                one.processing,
                way=self._anew(one),
            )
            for one in reading
        ]
        found = dict(zip((one.batch_slot for one in reading), self.read_on(wanted), strict=True))
        return [
            self._grow(one, leaves[one.batch_slot], found[one.batch_slot]) if one.batch_slot in found else []
            for one in queries
        ]

    def _leaves(self, query: TreeQuery) -> list[Leaf]:
        """Those of a trie that are to be extended."""
        leaves = query.trie.leaves(self._deepest(query) - 1, self.origin)
        if len(leaves) > self.max_open_leaves:
            return []
        if not self.ready(self._sequences[query.batch_slot], query.trie.tokens):
            return []
        return [leaf for leaf in leaves[: min(query.max_rows, self.max_leaves)] if leaf[2] >= MIN_PATH_LOGP]

    def _deepest(self, query: TreeQuery) -> int:
        return min(query.max_depth, self.longest - len(query.trie.tokens) - self.depths)

    def _has_grown(self, query: TreeQuery) -> bool:
        """Whether the text has grown since the trie was last extended."""
        return self._sequences[query.batch_slot].guessed != len(query.trie.tokens)

    def _anew(self, query: TreeQuery) -> bool:
        """Whether the way to its leaves is to be guessed again."""
        return self._has_grown(query)

    def _grow(self, query: TreeQuery, leaves: Sequence[Leaf], read: Sequence[tuple[Guesses, Guesses]]) -> Grown:
        """Grows a trie by what was read of its leaves."""
        state, trie, deepest = self._sequences[query.batch_slot], query.trie, self._deepest(query)
        anew = self._anew(query)
        state.guessed = len(trie.tokens)
        # nodes with a row that has read their path, parents first: that path, and what follows
        read_nodes: dict[Node, tuple[tuple[int, ...], RowGuesses]] = {}
        for (path, leaf, _), (way, table) in zip(leaves, read, strict=True):
            node = trie.root
            for depth, guesses in enumerate(way if anew else ()):
                read_nodes.setdefault(node, (path[:depth], guesses))
                node = node.children[path[depth]]
            read_nodes.setdefault(leaf, (path, table[0]))
        kept: dict[Node, Beam] = {}
        new: Grown = []
        # what is drawn for one slot is one draw: after several nodes these would not be independent
        top_k = 1 if state.params.rejection else self._top_k
        found = guesses_after_each([(row, [node.token]) for node, (_, row) in read_nodes.items()])
        for (node, (path, _)), guesses in zip(read_nodes.items(), found, strict=True):
            beam = [(joint_logp(trie, path), node)]  # by what has just been said of its parents
            kept[node] = grown_once(trie, beam, guesses, top_k, self.origin, new)
        # further down guesses come from the slots of a leaf, which know less than a row that has read the path
        beams = [
            ([one for one in kept[leaf] if one[1] not in read_nodes], table[1 : deepest - len(path)])
            for (path, leaf, _), (_, table) in zip(leaves, read, strict=True)
        ]
        return new + grown_beams(trie, beams, top_k, self.origin, read_nodes)
