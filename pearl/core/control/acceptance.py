"""How often guesses came true, by who made them, what that source thought of them, and how deep they lie.

A guess is judged once the text has come to its parent: so a rate is conditional on the prefix being right, and the
chance of a path is the product of its rates, from left to right. By these rates all sources compete for the rows of a
pass.
"""

from __future__ import annotations

import itertools
import math

from pearl.core.control.averages import ema
from pearl.core.trie import DRAFT

LOW = (0.05, 0.02, 0.01)  # bounds of the bins below 0.1; above each is a tenth wide
BINS = 10 + len(LOW)  # of a source's probability
FIRST_ACCEPTANCE = 0.7  # until something is known
_WEIGHT = 4.0  # of the source's own probability, in observed guesses
_WEIGHT_OF_ALL = 12.0  # at one depth, of what was observed at all depths
_LEAST = 1e-6  # nothing is impossible, whatever was seen
_FORGET = 0.98  # of what was observed, from guess to guess
_FIRST_WEIGHT = 0.05  # of one more first guess in the acceptance of these
_DEPTHS = (1, 2, 4, 8)  # the least depths of each class


class _Counts:
    """Of one source, bin by bin; the last: guesses without a probability."""

    def __init__(self) -> None:
        edges = (0.0, *reversed(LOW), *(b / 10 for b in range(1, 11)))
        centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self.accepted = [_WEIGHT * rate for rate in (*centres, FIRST_ACCEPTANCE)]
        self.judged = [_WEIGHT] * (BINS + 1)
        # by depth, with nothing in it but what was observed
        self.accepted_at = [[0.0] * (BINS + 1) for _ in _DEPTHS]
        self.judged_at = [[0.0] * (BINS + 1) for _ in _DEPTHS]

    def rate(self, b: int, depth: int) -> float:
        of_all, at = self.accepted[b] / self.judged[b], _class(depth)
        rate = (self.accepted_at[at][b] + _WEIGHT_OF_ALL * of_all) / (self.judged_at[at][b] + _WEIGHT_OF_ALL)
        return max(rate, _LEAST)

    def learn(self, b: int, depth: int, accepted: bool) -> None:
        at = _class(depth)
        for right, all_ in ((self.accepted, self.judged), (self.accepted_at[at], self.judged_at[at])):
            right[b] = _FORGET * right[b] + accepted
            all_[b] = _FORGET * all_[b] + 1


class AcceptanceRates:
    """How often a guess was accepted, by its origin, the log-probability that its source gave it and its depth below
    the root; at first a source is believed."""

    def __init__(self) -> None:
        self._by_origin: dict[str, _Counts] = {}
        self.first = FIRST_ACCEPTANCE  # of the drafter's first guesses: the papers' alpha

    def of(self, logp: float, depth: int = 1, origin: str = DRAFT) -> float:
        return self._counts(origin).rate(_bin(logp), depth)

    def learn(self, logp: float, accepted: bool, depth: int = 1, origin: str = DRAFT) -> None:
        self._counts(origin).learn(_bin(logp), depth, accepted)

    def learn_first(self, accepted: bool) -> None:
        self.first = ema(self.first, accepted, weight=_FIRST_WEIGHT)

    def _counts(self, origin: str) -> _Counts:
        if origin not in self._by_origin:
            self._by_origin[origin] = _Counts()
        return self._by_origin[origin]


def _bin(logp: float) -> int:
    if logp == 0:
        return BINS
    p = math.exp(logp)
    if p >= 0.1:
        return len(LOW) + min(9, int(p * 10))
    return sum(p >= bound for bound in LOW)


def _class(depth: int) -> int:
    return sum(depth >= least for least in _DEPTHS[1:])
