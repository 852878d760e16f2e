"""Guesses from the text itself, without weights: what followed its last tokens wherever they occurred before.

    text     a b c d e a b x a b         "a b" was followed by c and by x, once each; so was "b"
    match    2                           the longest suffix that occurred before
    guesses  x 0.3, c 0.3                from the counts, and from how often matches of that length came true

A suffix automaton finds all matches of every length at once (Blumer et al. 1985; as a draft source: SAM Decoding, Hu
et al. 2024, and SuffixDecoding, Oliaro et al. 2024). It is fed committed tokens only, so it has nothing to roll back;
a path of guesses is followed by walking its states. Chances are those of prediction by partial matching (Cleary and
Witten 1984): the counts of the longest match share the chance that what follows was seen there, shorter matches share
the rest. How large that chance is, by the length of a match and by how often it occurred, is learned from the text as
it is committed. So guesses reach far after a long match and hardly at all after a short one.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pearl.core.params import SamplingParams
from pearl.core.trie import Node
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
from pearl.drafters.suffix_automaton import SEPARATOR, Place, SuffixAutomaton

LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16)  # the shortest matches of each class
TIMES = (1, 2, 3, 6)  # that a match occurred: the fewest of each class
MIN_CHAIN_LOGP = math.log(0.02)  # a chain goes no further than where it is likelier than that to be right
MAX_NODES = 32  # of a tree
_LEVELS = 3  # matches of one place that are asked
_BROAD = 64  # different tokens after a match: it says nothing
_LEAST_LEFT = 0.02  # of the chance: no shorter match is asked
_TAIL = 16  # tokens that are compared before a text is taken to go on
_LEARNING = 0.02
Spot = tuple[SuffixAutomaton, Place]  # in the text of a batch slot
# for a node: minus its joint log-probability, a number, parent, token, log-probability, and of the parent: place, path
_Candidate = tuple[float, int, Node, int, float, Place, tuple[int, ...]]
# chances before anything was learned, by length, of a match that occurred once: as in answers of the embedded target
_FIRST = 0.2, 0.4, 0.55, 0.65, 0.7, 0.8, 0.88, 0.93


class Chances:
    """How often what follows a match is among what followed it before, by its length and how often it occurred."""

    def __init__(self) -> None:
        # [longest match or a shorter one][length][times]
        self.seen = [
            [[share * (1 - (1 - once) / time**0.2) for time in TIMES] for once in _FIRST] for share in (1.0, 0.5)
        ]

    def of(self, automaton: SuffixAutomaton, place: Place) -> list[tuple[int, float]]:
        """The tokens that may follow, likeliest first, and the chance of each."""
        found: dict[int, float] = {}
        left = 1.0
        for level, (match, follow) in enumerate(automaton.suffixes(place)):
            if level == _LEVELS or left < _LEAST_LEFT:
                break
            if len(follow) > _BROAD:
                continue
            new = {token: automaton.count(state) for token, state in follow.items() if token not in found}
            total = sum(new.values())
            chance = self.seen[level > 0][length_class(match)][_class(TIMES, total)]
            for token in reversed(new):  # of equals the newest first
                found[token] = left * chance * new[token] / total
            left *= 1 - chance
        found.pop(SEPARATOR, None)
        return sorted(found.items(), key=lambda one: -one[1])

    def learn(self, automaton: SuffixAutomaton, token: int) -> None:
        """`token` is what follows the text."""
        before: set[int] = set()
        for level, (match, follow) in enumerate(automaton.suffixes(automaton.end)):
            if level == _LEVELS:
                break
            if len(follow) > _BROAD:
                continue
            total = sum(automaton.count(state) for other, state in follow.items() if other not in before)
            row, times = self.seen[level > 0][length_class(match)], _class(TIMES, total)
            row[times] += _LEARNING * ((token in follow) - row[times])
            if token in follow:
                break
            before |= follow.keys()


def length_class(match: int) -> int:
    """Of matches that long: a number below `len(LENGTHS)`."""
    return _class(LENGTHS, match)


def _class(least: Sequence[int], number: int) -> int:
    return bisect.bisect_right(least, number) - 1


@dataclass
class _Text:
    """One sequence."""

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    tokens: list[int] = field(default_factory=list)  # that the automaton has

    def follow(self, tokens: Sequence[int], chances: Chances) -> None:
        """Adds what is new of a text. The tokens after the prompt, which is added first, are learned from."""
        known, learns = len(self.tokens), bool(self.tokens)
        for token in tokens[known:]:
            if learns:
                chances.learn(self.automaton, token)
            self.automaton.add(token)
        self.tokens += tokens[known:]

    def goes_on_in(self, tokens: Sequence[int]) -> bool:
        known = len(self.tokens)
        return len(tokens) >= known and list(tokens[max(0, known - _TAIL) : known]) == self.tokens[-_TAIL:]


class SuffixIndex:
    """The texts of all batch slots."""

    def __init__(self) -> None:
        self.chances = Chances()
        self._texts: dict[int, _Text] = {}

    def begin(self, batch_slot: int, prediction: Sequence[int] = ()) -> None:
        """A new text. `prediction`: tokens that are likely to occur in it."""
        text = self._texts[batch_slot] = _Text()
        for token in (*prediction, SEPARATOR) if prediction else ():
            text.automaton.add(token)

    def text(self, batch_slot: int, tokens: Sequence[int]) -> _Text:
        """That of a slot, brought up to `tokens`. One that they do not go on is forgotten."""
        text = self._texts.get(batch_slot)
        if text is None or not text.goes_on_in(tokens):
            text = self._texts[batch_slot] = _Text()
        text.follow(tokens, self.chances)
        return text

    def place(self, batch_slot: int, tokens: Sequence[int], path: Sequence[int] = ()) -> Spot:
        """Where a path after the committed `tokens` ends."""
        automaton = self.text(batch_slot, tokens).automaton
        place = automaton.end
        for token in path:
            place = automaton.after(place, token)
        return automaton, place

    def next(self, spot: Spot) -> tuple[int, int, Spot] | None:
        """The one guess of what follows there, the length of the match that it rests on, and where it ends."""
        automaton, place = spot
        for match, follow in automaton.suffixes(place):
            # the newest of those that occurred most
            token = max(reversed(follow), key=lambda one: automaton.count(follow[one]))
            return None if token == SEPARATOR else (token, match, (automaton, automaton.after(place, token)))
        return None


class SuffixSource(DraftSource):
    """Makes chains and trees, at no cost: it has no model."""

    origin = "suffix"
    grows_trees = True

    def __init__(self, most: int = MAX_NODES):
        """`most`: guesses of a chain, nodes of a tree."""
        self._index, self._most = SuffixIndex(), most

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        if not continues:
            self._index.begin(batch_slot)

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return self._propose(ChainQuery(0, tokens, (), room))

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        return [self._propose(query) for query in queries]

    def _propose(self, query: ChainQuery) -> Chain:
        """The likeliest way on, as far as all of it from the text on is likely enough."""
        automaton, place = self._index.place(query.batch_slot, query.tokens)
        joint = 0.0
        for token in query.path:
            chance = dict(self._index.chances.of(automaton, place)).get(token, 0.0)
            joint, place = joint + _log(chance), automaton.after(place, token)
        chain: list[tuple[int, Proposal, float]] = []
        while len(chain) < min(query.room, self._most) and (likely := self._index.chances.of(automaton, place)):
            token, chance = likely[0]
            joint += _log(chance)
            if joint < MIN_CHAIN_LOGP:
                break
            chain.append((token, (), _log(chance)))
            place = automaton.after(place, token)
        return query.allowed(chain)

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        return [self._extend(query) for query in queries]

    def _extend(self, query: TreeQuery) -> Grown:
        """The likeliest nodes, whoever made those above them."""
        automaton, place = self._index.place(query.batch_slot, query.trie.tokens)
        grown: Grown = []
        order = itertools.count()
        heap: list[_Candidate] = []

        def push(parent: Node, place: Place, joint: float, path: tuple[int, ...]) -> None:
            """What may follow a node, the nodes there are among it."""
            if len(path) == query.max_depth:
                return
            guesses = {token: _log(chance) for token, chance in self._index.chances.of(automaton, place)[:MAX_CHILDREN]}
            guesses |= {token: node.logp for token, node in parent.children.items()}
            for token, logp in guesses.items():
                if joint + logp >= MIN_PATH_LOGP:
                    heapq.heappush(heap, (-(joint + logp), next(order), parent, token, logp, place, path))

        push(query.trie.root, place, 0.0, ())
        for _ in range(self._most):
            if not heap:
                break
            joint, _, parent, token, logp, place, path = heapq.heappop(heap)
            node = parent.children.get(token)
            if node is None:
                if query.processing and query.processing.forbids(query.trie.tokens, path, token):
                    continue
                node = query.trie.grow(parent, token, (), logp, self.origin)
                assert node is not None, "a source extends the tree that it was given"
                grown.append((parent, node))
            push(node, automaton.after(place, token), -joint, (*path, token))
        return grown


def _log(chance: float) -> float:
    """Below nought, which is said of guesses whose chance nobody knows."""
    return math.log(min(max(chance, 1e-9), 0.999))
