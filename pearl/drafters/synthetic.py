"""A drafter that is right as often as it is told to be: what the runtime makes of a given acceptance.

Knows: what the target alone writes after the prompt (its *reference*, which whoever has it says beforehand), and coins.
Refuses to know: models. A guess is the reference's token where its coin says so, else another one; so it is right with
a chance that nothing else has a part in, and the target checks it like any guess.

A coin is a function of the text, the place in it and the guess's rank there, so that a run can be repeated and no
schedule changes one. In a tree there may be a second guess for a place, the correction that is prepared.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from pearl.config.synthetic import SyntheticDraft
from pearl.core.params import SamplingParams
from pearl.core.sampling import noise
from pearl.core.trie import Node
from pearl.drafters.draft_source import MIN_PATH_LOGP, Chain, ChainQuery, DraftSource, Grown, TreeQuery

_FIRST, _SECOND = 11, 12  # purposes of their own, see `pearl.core.sampling.noise`
_NEVER = 1e-6  # in place of a chance of nought, whose logarithm is wanted
_OPEN_LEAVES = 192  # with more a tree rests until the root moves


class SyntheticSource(DraftSource):
    """A forward makes one guess after a chain; or after each of the likeliest leaves of a tree one, or two."""

    grows_trees = True
    origin = "synthetic"

    def __init__(self, draft: SyntheticDraft, seed: int = 0, sleep: Callable[[float], None] = time.sleep):
        self._draft, self._seed, self._sleep = draft, seed, sleep
        self._references: dict[int, tuple[int, Sequence[int]]] = {}  # by slot: the coins' seed, and the whole text
        if draft.forward_s:
            self.costs = (draft.forward_s,)

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._references.pop(batch_slot, None)

    def expect(self, batch_slot: int, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """The target alone writes `tokens` after `prompt`."""
        text = [*prompt, *tokens]
        self._references[batch_slot] = self._seed + zlib.crc32(np.array(text, np.int32).tobytes()), text

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return self.propose_batch([ChainQuery(0, tokens, (), room)])[0]

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        places = [self._place(one.batch_slot, len(one.tokens) + len(one.path)) for one in queries]
        if any(places):
            self._forward(sum(map(bool, places)))
        depths = [len(one.path) + 1 for one in queries]
        return [
            [(self._guesses(*place, depth)[0], ())] if place else []
            for place, depth in zip(places, depths, strict=True)
        ]

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        chosen = [self._leaves(one) for one in queries]
        if any(chosen):
            self._forward(sum(map(len, chosen)))
        return [
            [new for path, node in leaves for new in self._grow(one, path, node)]
            for one, leaves in zip(queries, chosen, strict=True)
        ]

    def _leaves(self, query: TreeQuery) -> list[tuple[tuple[int, ...], Node]]:
        leaves = query.trie.leaves(query.max_depth - 1)
        known = [
            (path, node)
            for path, node, logp in leaves
            if self._place(query.batch_slot, len(query.trie.tokens) + len(path)) and logp >= MIN_PATH_LOGP
        ]
        return known[: query.max_rows] if len(leaves) <= _OPEN_LEAVES else []

    def _grow(self, query: TreeQuery, path: tuple[int, ...], node: Node) -> Grown:
        place = self._place(query.batch_slot, len(query.trie.tokens) + len(path))
        assert place, "a leaf that was chosen has a reference"
        chance, second = self._draft.chance(len(path) + 1), self._draft.correction
        shares = (chance, (1 - chance) * second) if second else (chance,)
        grown: Grown = []
        for token, share in zip(self._guesses(*place, len(path) + 1), shares, strict=False):
            child = query.trie.grow(node, token, (), math.log(max(share, _NEVER)), self.origin)
            assert child is not None, "a source extends the tree that it was given"
            grown.append((node, child))
        return grown

    def _place(self, batch_slot: int, position: int) -> tuple[int, int, int] | None:
        """Of the token there: the coins' seed, the position, and the target's own; None where the text is not known."""
        seed, text = self._references.get(batch_slot, (0, ()))
        return (seed, position, text[position]) if position < len(text) else None

    def _guesses(self, seed: int, position: int, right: int, depth: int) -> tuple[int, int]:
        """The first and the second guess for a place, which differ."""
        other, another = [token for token in (right - 1, right - 2, right + 1, right + 2) if token >= 0][:2]
        if noise.uniform(seed, position, _FIRST) < self._draft.chance(depth):
            return right, other
        return other, right if noise.uniform(seed, position, _SECOND) < self._draft.correction else another

    def _forward(self, rows: int) -> None:
        self.forwards += 1
        self.rows += rows
        if self._draft.forward_s:
            self._sleep(self._draft.forward_s)
