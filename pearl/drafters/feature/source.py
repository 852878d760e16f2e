"""The feature drafter as a draft source: one forward gives the distributions of the next K tokens.

What the target has read comes with its verdicts, as features. Known positions whose features are there are read once
and stay in the cache; tokens beyond them are guesses or too new, so they enter with the learned hidden state instead
and are read anew each time. One forward holds the newly confirmed rows, the paths of the leaves that it extends, and
the slots after each leaf:

    confirmed rows                 see the text up to themselves
    a leaf's path                  sees the text and itself up to each row
    a leaf's slots                 see the text, the path, and themselves up to each row (`pearl.drafters.feature.mask`)

Bits are of no account here: whatever is drafted, the target decides.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.core.sampling import ranked
from pearl.core.trie import Node, Trie, shared_prefix
from pearl.drafters.draft_source import (
    MAX_CHILDREN,
    MIN_PATH_LOGP,
    Chain,
    ChainQuery,
    DraftSource,
    Grown,
    Proposal,
    TreeQuery,
)
from pearl.drafters.feature.forward_rows import (
    FeatureCache,
    FeatureSequence,
    PathsQuery,
    batch_mask,
    concatenated,
    rows_of,
)
from pearl.drafters.feature.network import FeatureDrafter
from pearl.models.timing import best_of

TOP_K = 8  # paths that survive a depth
_TIMED = (64, 3)  # tokens of text, and repetitions, when a forward is timed

Guesses = list[list[tuple[int, float, Proposal]]]  # by depth, likeliest first: (token, log q, proposal)


class FeatureSource(DraftSource):
    """Chains and trees of the feature drafter. A path less likely than `MIN_PATH_LOGP` is not gone on from."""

    grows_trees = makes_trees_alone = True
    max_open_leaves = 128  # with more it rests until the root moves
    max_leaves = 4  # extended by one forward

    def __init__(self, drafter: FeatureDrafter, top_k: int = 0, longest: int = 1 << 20):
        """`drafter` has its target attached. `top_k`: paths kept at each depth, 0: `TOP_K`; 1 makes chains.
        `longest`: tokens of a sequence."""
        self._drafter, self._top_k, self._longest = drafter.eval(), top_k or TOP_K, longest
        self.layers = drafter.shape.features
        self.device = drafter.mask_embedding.device
        self._vocabulary = drafter.vocabulary
        self._sequences: dict[int, FeatureSequence] = {}  # by batch slot
        self.begin(0, SamplingParams())
        self.costs = self._time()

    @property
    def depths(self) -> int:
        """K: guesses that follow one another in one forward."""
        return self._drafter.shape.depths

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        """The target tells the features of the whole prompt in any case."""
        old = self._sequences.get(batch_slot) or FeatureSequence(params, FeatureCache(self._drafter))
        self._sequences[batch_slot] = FeatureSequence(params, old.cache, old.read if continues else [])

    def observe(self, features: Features, batch_slot: int = 0) -> None:
        self._sequences[batch_slot].features.append(features)
        self._sequences[batch_slot].known += len(features)

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        """The best guess of every depth, one after the other."""
        return self.propose_batch([ChainQuery(0, tokens, (), room)])[0]

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        """The same after several sequences, in one forward."""
        wanted: dict[int, PathsQuery] = {}
        for one in queries:
            state, tokens = self._sequences[one.batch_slot], [*one.tokens, *one.path]
            path = tokens[state.known + 1 :] if self.layers else []
            trunk = tokens[: len(tokens) - len(path)]
            if self._ready(state, trunk) and len(tokens) + self.depths <= self._longest:
                wanted[one.batch_slot] = PathsQuery(state, trunk, [path], one.tokens, one.processing)
        found = dict(zip(wanted, self._read_on(list(wanted.values())), strict=True))
        return [
            [(depth[0][0], depth[0][2]) for depth in found[one.batch_slot][0][1][: one.room]]
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
            )
            for one in reading
        ]
        found = dict(zip((one.batch_slot for one in reading), self._read_on(wanted), strict=True))
        return [
            self._hang(one, leaves[one.batch_slot], found[one.batch_slot]) if one.batch_slot in found else []
            for one in queries
        ]

    def _leaves(self, query: TreeQuery) -> list[tuple[tuple[int, ...], Node, float]]:
        """Those of a trie that are to be extended."""
        leaves = query.trie.leaves(self._deepest(query) - 1)
        if len(leaves) > self.max_open_leaves:
            return []
        if not self._ready(self._sequences[query.batch_slot], query.trie.tokens):
            return []
        return [leaf for leaf in leaves[: min(query.max_rows, self.max_leaves)] if leaf[2] >= MIN_PATH_LOGP]

    def _deepest(self, query: TreeQuery) -> int:
        return min(query.max_depth, self._longest - len(query.trie.tokens) - self.depths)

    def _hang(
        self,
        query: TreeQuery,
        leaves: Sequence[tuple[tuple[int, ...], Node, float]],
        read: Sequence[tuple[Guesses, Guesses]],
    ) -> Grown:
        """Grows a trie by what was read of its leaves."""
        state, trie, deepest = self._sequences[query.batch_slot], query.trie, self._deepest(query)
        anew = state.guessed != len(trie.tokens)
        state.guessed = len(trie.tokens)
        new: Grown = []
        gone: set[int] = set()
        for (path, leaf, logp), (way, table) in zip(leaves, read, strict=True):
            node, joint = trie.root, 0.0
            for token, guesses in zip(path, way if anew else (), strict=False):
                if id(node) not in gone:
                    gone.add(id(node))
                    new += self._grow(trie, node, joint, [guesses])
                node = node.children[token]
                joint += node.logp
            new += self._grow(trie, leaf, joint if anew else logp, table[: deepest - len(path)])
        return new

    def _ready(self, state: FeatureSequence, trunk: Sequence[int]) -> bool:
        """Whether the features of all of the text but its last token are there, if any are wanted."""
        return not self.layers or state.known >= max(1, len(trunk) - 1)

    def _grow(self, trie: Trie, leaf: Node, logp: float, table: Guesses) -> Grown:
        """A beam of highest joint probability: every surviving parent meets every candidate of its depth."""
        beam = [(logp, leaf)]
        new: Grown = []
        for guesses in table:
            paths = [
                (joint + q, rank, parent, token, proposal, q)
                for joint, parent in beam
                for rank, (token, q, proposal) in enumerate(guesses)
            ]
            first = paths[0] if paths else None
            paths = sorted(paths, key=lambda path: (-path[0], path[1]))[: self._top_k]
            beam = []
            for path in paths:
                joint, _, parent, token, proposal, q = path
                if joint < MIN_PATH_LOGP and path is not first:
                    continue
                there = token in parent.children
                child = trie.grow(parent, token, proposal, q)
                assert child is not None, "a source extends the tree that it was given"
                if not there:
                    new.append((parent, child))
                beam.append((joint, child))
            if not beam:
                break
        return new

    def guess(self, trunk: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Guesses]:
        """For each path after the trunk, guesses of K depths."""
        return [table for _, table in self._read_on([PathsQuery(self._sequences[0], trunk, paths)])[0]]

    @torch.inference_mode()
    def _read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        """One forward. For each path of each sequence: what follows each node on its way, the trunk's last token first,
        and guesses of K depths after its end."""
        if not queries:
            return []
        drafter = self._drafter
        inputs, positions, blocks, wanted, params = [], [], [], [], []
        first = 0
        for one in queries:
            kept = min(shared_prefix(one.state.read, one.trunk), len(one.trunk) - 1)
            rows, where, block, mine = rows_of(drafter, one, kept)
            inputs.append(rows)
            positions += where
            blocks.append(block)
            wanted += [first + row for row in mine]
            params += [one.state.params] * len(mine)
            first += len(rows)
        mask = batch_mask(blocks).to(self.device)
        past = [one.state.cache.upto(block.kept) for one, block in zip(queries, blocks, strict=True)]
        hidden, made = drafter.stack(
            torch.cat(inputs)[None], torch.tensor(positions, device=self.device), mask, concatenated(past)
        )
        first = 0
        for one, block in zip(queries, blocks, strict=True):
            one.state.cache.keep(made, block.kept, slice(first, first + block.fresh))
            one.state.read = list(one.trunk)
            first += block.rows
        self.forwards += 1
        self.rows += first
        logits = self._processed(drafter.head(hidden[0, wanted]).float(), queries)
        guesses = self._ranked(logits, [positions[row] + 1 for row in wanted], params)
        found: list[list[tuple[Guesses, Guesses]]] = []
        at = 0
        for one in queries:
            found.append([])
            for path in one.paths:
                end = at + len(path)
                found[-1].append((guesses[at:end], guesses[end : end + self.depths]))
                at = end + self.depths
        return found

    def _processed(self, logits: Tensor, queries: Sequence[PathsQuery]) -> Tensor:
        """With what the target does to its own; over the target's vocabulary, if there is anything.  logits: [R, V]"""
        if not any(one.processing for one in queries):
            return logits
        rows = [sum(len(path) + self.depths for path in one.paths) for one in queries]
        parts = self._of_target(logits).split(rows)
        return torch.cat([one.processed(part, self.depths) for one, part in zip(queries, parts, strict=True)])

    def _of_target(self, logits: Tensor) -> Tensor:
        """From the draft vocabulary to the target's token ids; what is there already stays.  logits: [R, V]"""
        size = int(self._vocabulary.max()) + 1
        if logits.shape[1] == size:
            return logits
        return logits.new_full((len(logits), size), -torch.inf).index_copy_(1, self._vocabulary, logits)

    def _ranked(self, logits: Tensor, positions: Sequence[int], params: Sequence[SamplingParams]) -> Guesses:
        """logits: [R, V] over the draft vocabulary or the target's; positions: of the token that each row guesses;
        params: of its sequence."""
        found: Guesses = []
        for own, group in itertools.groupby(range(len(logits)), key=params.__getitem__):
            rows = list(group)
            found += self._ranked_by(logits[rows[0] : rows[-1] + 1], [positions[row] for row in rows], own)
        return found

    def _ranked_by(self, logits: Tensor, positions: Sequence[int], params: SamplingParams) -> Guesses:
        if params.greedy and logits.shape[1] == len(self._vocabulary):
            found = ranked(logits, params, positions, MAX_CHILDREN)
            return [[(int(self._vocabulary[at]), q, proposal) for at, q, proposal in guesses] for guesses in found]
        # noise and filters are functions of the target's own token ids
        return ranked(self._of_target(logits), params, positions, MAX_CHILDREN)

    def _time(self) -> tuple[float, ...]:
        """Seconds of a forward of 1, 2, ... leaves."""
        length, rounds = _TIMED
        text = [0] * length
        if self.layers:
            self.observe(np.zeros((length - 1, len(self.layers) * self._drafter.shape.hidden), np.int16))
        leaves = [[[0]] * count for count in range(1, self.max_leaves + 1)]
        costs = tuple(best_of(rounds, functools.partial(self.guess, text, paths)) for paths in leaves)
        self.begin(0, SamplingParams())
        self.forwards = self.rows = 0
        return costs
