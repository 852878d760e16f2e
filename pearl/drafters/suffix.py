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

With a memory of earlier texts (`pearl.drafters.text_memory`) the one that is most like the end of this text says what
follows, for as long as it is right.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pearl.core.params import SamplingParams
from pearl.core.trie import Node
from pearl.drafters.draft_source import (
    MAX_CHILDREN,
    MIN_PATH_LOGP,
    Chain,
    ChainQuery,
    DraftGuess,
    DraftSource,
    Grown,
    TreeQuery,
)
from pearl.drafters.suffix_automaton import SEPARATOR, Place, SuffixAutomaton
from pearl.drafters.text_memory import MATCHED, WINDOWS, Match, TextMemory

LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16)  # the shortest matches of each class
RECALLED = (1, 8, 16, 32, MATCHED)  # the same of matches in earlier texts
TIMES = (1, 2, 3, 6)  # that a match occurred: the fewest of each class
SURE = 24  # tokens: what followed so long a match in an earlier text follows here too
MIN_CHAIN_LOGP = math.log(0.02)  # a chain goes no further than where it is likelier than that to be right
MAX_NODES = 32  # of a tree
_LEVELS = 3  # matches of one place that are asked
_BROAD = 64  # different tokens after a match: it says nothing
_LEAST_LEFT = 0.02  # of the chance: no shorter match is asked
_TAIL = 16  # tokens that are compared before a text is taken to go on
_LEARNING = 0.02
# for a node: minus its joint log-probability, a number, parent, token, log-probability, and of the parent: spot, path
_Candidate = tuple[float, int, Node, int, float, "Spot", tuple[int, ...]]
# chances before anything was learned, by length, of a match that occurred once: as in answers of the embedded target
_FIRST = 0.2, 0.4, 0.55, 0.65, 0.7, 0.8, 0.88, 0.93


class Chances:
    """How often what follows a match is among what followed it before, by its length and how often it occurred."""

    def __init__(self) -> None:
        # [longest match or a shorter one][length][times]
        self.seen = [
            [[share * (1 - (1 - once) / time**0.2) for time in TIMES] for once in _FIRST] for share in (1.0, 0.5)
        ]

        self._recalled = [0.5, 0.65, 0.8, 0.9, 0.96]

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

    def recalled(self, length: int) -> float:
        """That of the token which followed a match of that length in an earlier text."""
        return self._recalled[_class(RECALLED, length)]

    def learn_recalled(self, length: int, right: bool) -> None:
        at = _class(RECALLED, length)
        self._recalled[at] += _LEARNING * (right - self._recalled[at])

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


class Spot(NamedTuple):
    """A place in the text of a batch slot, and that in an earlier text which it is like."""

    automaton: SuffixAutomaton
    place: Place
    recalled: Match | None = None


@dataclass
class _Text:
    """One sequence."""

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    tokens: list[int] = field(default_factory=list)  # that the automaton has
    recalled: Match | None = None  # of them, in an earlier text
    moves: int = 0  # of the memory, when that was found

    def follow(self, tokens: Sequence[int], chances: Chances, memory: TextMemory | None) -> None:
        """Adds what is new of a text. The tokens after the prompt, which is added first, are learned from."""
        known, learns = len(self.tokens), bool(self.tokens)
        new = tokens[known:]
        for token in new:
            if learns:
                chances.learn(self.automaton, token)
            self.automaton.add(token)
        self.tokens += new
        if memory and (new or not known):
            self._recall(new if learns else (), chances, memory)

    def _recall(self, new: Sequence[int], chances: Chances, memory: TextMemory) -> None:
        """Goes on in the earlier text, or looks for one that is more like this."""
        if self.moves != memory.moves:
            self.recalled, self.moves = None, memory.moves
        for token in new:
            if self.recalled is None:
                break
            place, length = self.recalled
            right = memory.token(place) == token
            chances.learn_recalled(length, right)
            self.recalled = Match(place + 1, length + 1) if right else None
        if self.recalled is None or self.recalled.length < WINDOWS[0]:
            self.recalled = memory.find(self.tokens)
        if self.recalled:
            memory.touch(self.recalled.place)

    def goes_on_in(self, tokens: Sequence[int]) -> bool:
        known = len(self.tokens)
        return len(tokens) >= known and list(tokens[max(0, known - _TAIL) : known]) == self.tokens[-_TAIL:]


class SuffixIndex:
    """The texts of all batch slots, and perhaps earlier ones."""

    def __init__(self, memory: TextMemory | None = None) -> None:
        self.chances, self.memory = Chances(), memory
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
        text.follow(tokens, self.chances, self.memory)
        return text

    def place(self, batch_slot: int, tokens: Sequence[int], path: Sequence[int] = ()) -> Spot:
        """Where a path after the committed `tokens` ends."""
        text = self.text(batch_slot, tokens)
        spot = Spot(text.automaton, text.automaton.end, text.recalled)
        for token in path:
            spot = self.after(spot, token)
        return spot

    def after(self, spot: Spot, token: int) -> Spot:
        """Where a token more ends."""
        automaton, place, recalled = spot
        if recalled and self.memory:
            same = self.memory.token(recalled.place) == token
            recalled = Match(recalled.place + 1, recalled.length + 1) if same else None
        return Spot(automaton, automaton.after(place, token), recalled)

    def likely(self, spot: Spot) -> list[tuple[int, float]]:
        """What may follow there, likeliest first, and the chance of each. What an earlier text recalls has its chance,
        and the text itself shares the rest."""
        found = self.chances.of(spot.automaton, spot.place)
        if not spot.recalled or not self.memory or (token := self.memory.token(spot.recalled.place)) < 0:
            return found
        chance = self.chances.recalled(spot.recalled.length)
        shares = {token: chance} | {other: (1 - chance) * share for other, share in found if other != token}
        shares[token] += (1 - chance) * dict(found).get(token, 0.0)
        return sorted(shares.items(), key=lambda one: -one[1])

    def next(self, spot: Spot) -> tuple[int, int, Spot] | None:
        """The one guess of what follows there, the length of the match that it rests on, and where it ends."""
        automaton = spot.automaton
        for match, follow in automaton.suffixes(spot.place):
            # the newest of those that occurred most
            token = max(reversed(follow), key=lambda one: automaton.count(follow[one]))
            return None if token == SEPARATOR else (token, match, self.after(spot, token))
        return None


class SuffixSource(DraftSource):
    """Makes chains and trees, at no cost: it has no model."""

    origin = "suffix"
    grows_trees = True

    def __init__(self, most: int = MAX_NODES, memory: TextMemory | None = None):
        """`most`: guesses of a chain, nodes of a tree. `memory`: of earlier texts; those that are over go there."""
        self._index, self._most = SuffixIndex(memory), most

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        if not continues:
            self._index.begin(batch_slot)

    def predict(self, batch_slot: int, tokens: Sequence[int]) -> None:
        self._index.begin(batch_slot, tokens)

    def is_sure(self, batch_slot: int, tokens: Sequence[int]) -> bool:
        index = self._index
        recalled = index.text(batch_slot, tokens).recalled if index.memory else None
        return recalled is not None and recalled.length >= SURE

    def remember(self, tokens: Sequence[int]) -> None:
        if self._index.memory:
            self._index.memory.add(tokens)

    def begin_round(self, forget: bool = False) -> None:
        if self._index.memory:
            self._index.memory.begin_round(forget)

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return self._propose(ChainQuery(0, tokens, (), room))

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        return [self._propose(query) for query in queries]

    def _propose(self, query: ChainQuery) -> Chain:
        """The likeliest way on, as far as all of it from the text on is likely enough."""
        index = self._index
        spot = index.place(query.batch_slot, query.tokens)
        joint = 0.0
        for token in query.path:
            joint += _log(dict(index.likely(spot)).get(token, 0.0))
            spot = index.after(spot, token)
        chain: list[DraftGuess] = []
        while len(chain) < min(query.room, self._most) and (likely := index.likely(spot)):
            token, chance = likely[0]
            joint += _log(chance)
            if joint < MIN_CHAIN_LOGP:
                break
            chain.append(DraftGuess(token, (), _log(chance)))
            spot = index.after(spot, token)
        return query.allowed(chain)

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        return [self._extend(query) for query in queries]

    def _extend(self, query: TreeQuery) -> Grown:
        """The likeliest nodes, whoever made those above them."""
        index = self._index
        grown: Grown = []
        order = itertools.count()
        heap: list[_Candidate] = []

        def push(parent: Node, spot: Spot, joint: float, path: tuple[int, ...]) -> None:
            """What may follow a node, the nodes there are among it."""
            if len(path) == query.max_depth:
                return
            guesses = {token: _log(chance) for token, chance in index.likely(spot)[:MAX_CHILDREN]}
            sure = spot.recalled is not None and spot.recalled.length >= SURE
            for token, node in parent.children.items():
                guesses[token] = max(guesses.get(token, -math.inf), node.logp) if sure else node.logp
            for token, logp in guesses.items():
                if joint + logp >= MIN_PATH_LOGP:
                    heapq.heappush(heap, (-(joint + logp), next(order), parent, token, logp, spot, path))

        push(query.trie.root, index.place(query.batch_slot, query.trie.tokens), 0.0, ())
        for _ in range(self._most):
            if not heap:
                break
            joint, _, parent, token, logp, spot, path = heapq.heappop(heap)
            node = parent.children.get(token)
            if node is not None and logp > node.logp:  # an earlier text knows better
                node.logp, node.origin = logp, self.origin
            if node is None:
                if query.processing and query.processing.forbids(query.trie.tokens, path, token):
                    continue
                node = query.trie.grow(parent, token, (), logp, self.origin)
                assert node is not None, "a source extends the tree that it was given"
                grown.append((parent, node))
            push(node, index.after(spot, token), -joint, (*path, token))
        return grown


def _log(chance: float) -> float:
    """Below nought, which is said of guesses whose chance nobody knows."""
    return math.log(min(max(chance, 1e-9), 0.999))
