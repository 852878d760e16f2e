"""What grows of the guesses of one forward: a row that has read a path says what follows it, slots what lies beyond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pearl.core.params import SamplingParams
from pearl.core.trie import Node, Trie
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.guesses import Guess, Guesses
from pearl.drafters.one_pass import DraftedText, Leaf, OnePassSource, PathsQuery


def guesses(**chances: float) -> list[Guess]:
    """Of tokens called t1, t2, ..."""
    return [(int(name[1:]), math.log(chance), ()) for name, chance in chances.items()]


class Said(OnePassSource):
    """Of a path what stands in a table: guesses after each prefix of it, and those of slots."""

    origin = "feature"

    def __init__(self, after: dict[tuple[int, ...], list[Guess]], slots: dict[tuple[int, ...], Guesses]):
        super().__init__(3)
        self._after, self._slots = after, slots
        self.begin(0, SamplingParams())

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._sequences[batch_slot] = DraftedText(params)

    def _leaves(self, query: TreeQuery) -> list[Leaf]:
        leaves = super()._leaves(query)
        return leaves if not query.trie.root.children else [((), query.trie.root, 0.0), *leaves]

    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        (query,) = queries
        paths = [tuple(path) for path in query.paths]
        return [[([self._after[path[:end]] for end in range(len(path))], self._table(path)) for path in paths]]

    def _table(self, path: tuple[int, ...]) -> Guesses:
        return [self._after[path], *self._slots[path]]


def chances(node: Node) -> dict[int, float]:
    return {token: round(math.exp(child.logp), 3) for token, child in node.children.items()}


def path_of(*some: float) -> tuple[Any, ...]:
    """A trie with the path 1, 2, ..., of nodes that are so likely, and these nodes."""
    trie = Trie([9])
    nodes = [trie.root]
    for token, chance in enumerate(some, 1):
        child = trie.grow(nodes[-1], token, (), math.log(chance), "feature")
        assert child is not None
        nodes.append(child)
    return trie, *nodes[1:]


def test_slots_of_the_root_do_not_overrule_rows_that_have_read_the_path():
    trie, first, second = path_of(0.3, 0.9)
    source = Said(
        {(): guesses(t1=0.8, t5=0.1), (1,): guesses(t2=0.6, t3=0.3), (1, 2): guesses(t4=0.7)},
        {(): [guesses(t2=0.2, t7=0.2), guesses(t8=0.5)], (1, 2): [guesses(t4=0.4), guesses(t4=0.4)]},
    )
    source.extend([TreeQuery(0, trie, 15, 8)])
    assert chances(trie.root) == {1: 0.8, 5: 0.1}
    assert chances(first) == {2: 0.6, 3: 0.3}, "not what the root's slot says"
    assert chances(second) == {4: 0.7}
    assert chances(trie.root.children[5]) == {2: 0.2, 7: 0.2}, "where nobody has read, slots say it"


def test_a_path_is_as_likely_as_its_nodes_are_now():
    """0.3 x 0.012 was too little to offer anything but the best; what the rows on its way say now is more."""
    trie, _, second = path_of(0.3, 0.012)
    source = Said(
        {(): guesses(t1=0.8), (1,): guesses(t2=0.6), (1, 2): guesses(t4=0.5, t5=0.3)},
        {(): [guesses(t2=0.2), guesses(t8=0.5)], (1, 2): [guesses(t4=0.4), guesses(t4=0.4)]},
    )
    source.extend([TreeQuery(0, trie, 15, 8)])
    assert chances(second) == {4: 0.5, 5: 0.3}
