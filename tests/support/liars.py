"""Draft sources that lie: about how sure they are, and about how much they have to say."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pearl.core.trie import Node
from pearl.drafters.draft_source import Chain, ChainQuery, DraftSource, Grown, TreeQuery


class SureAndWrong(DraftSource):
    """Makes things up, whole trees of them, and calls every guess as good as certain."""

    grows_trees = True
    costs = (1e-4,)

    def __init__(self, vocabulary: int, seed: int):
        self._vocabulary, self._random = vocabulary, random.Random(seed)

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return [(self._random.randrange(self._vocabulary), (), -1e-6) for _ in range(min(room, 3))]

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        return [self._extend(query) for query in queries]

    def _extend(self, query: TreeQuery) -> Grown:
        grown: Grown = []
        parents: list[tuple[Node, int]] = [(query.trie.root, 0)]
        for _ in range(min(query.max_rows, 6)):
            parent, depth = self._random.choice(parents)
            token = self._random.randrange(self._vocabulary)
            if depth >= query.max_depth or token in parent.children:
                continue
            node = query.trie.grow(parent, token, (), -1e-6, self.origin)
            assert node is not None
            grown.append((parent, node))
            parents.append((node, depth + 1))
        return grown


class TooTalkative(DraftSource):
    """Says more than it is asked for."""

    def __init__(self, vocabulary: int, seed: int):
        self._vocabulary, self._random = vocabulary, random.Random(seed)

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return [(self._random.randrange(self._vocabulary), (), -0.1) for _ in range(room + 3)]


class ShortOfAnswers(DraftSource):
    """Answers fewer queries than there are."""

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        return [[(0, ())] for _ in queries[1:]]
