"""What a pass costs: what was measured at loading, drawn to what such passes have taken since.

A measurement on a busy machine has the wrong shape and not only the wrong size: a count that happened to be timed in a
quiet moment looks cheap. So passes correct each row count by itself, and counts between two that were read by both of
them. Else one that looks dear would never be tried, and one that looks cheap would be the only one that is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from pearl.core.control.averages import ema
from pearl.core.token_buckets import LIMIT, BatchedTokenBuckets, TokenBuckets

PRIOR_WEIGHT = 2  # what a pass cost at loading counts as much as this many passes
EMA_PASSES = 8  # the last so many make an average
LONGEST = 2.0  # times as long as usual: what made a pass longer than that was not its rows
LEAST_PASSES = 0.5  # a row count that was last read longer ago than that is not asked
_SCALE_WEIGHT = 0.1  # of one more pass in how many times as long they take as at loading
_FORGET = 0.97  # of what was told, from pass to pass


class PassCosts(ABC):
    """Seconds of a pass by its rows."""

    def __init__(self, buckets: TokenBuckets | BatchedTokenBuckets):
        self._buckets = buckets
        self._scale: float | None = None  # a pass costs this many times what was measured at loading

    @abstractmethod
    def observe(self, rows: int, paths: int, forward_s: float) -> None:
        """A pass of so many rows, some of them on `paths` beside its chains, took so long."""

    @abstractmethod
    def __call__(self, rows: int, paths: int = 0) -> float:
        """Of a pass of so many rows, some of them on `paths` beside its chains."""

    @property
    def scale(self) -> float:
        return 1.0 if self._scale is None else self._scale

    def _rescale(self, ratio: float) -> None:
        """`ratio`: the seconds of a pass over those that were measured at loading."""
        self._scale = ratio if self._scale is None else ema(self._scale, ratio, weight=_SCALE_WEIGHT)

    def _padded(self, rows: int) -> int:
        return self._buckets.pad(min(rows, self._buckets.most))


class AveragedCosts(PassCosts):
    """Of row counts too many to tell of each other: each has an average of its own."""

    def __init__(self, buckets: TokenBuckets | BatchedTokenBuckets):
        super().__init__(buckets)
        self._seen: dict[int, tuple[int, float]] = {}  # by padded rows: how many passes, their average

    def observe(self, rows: int, paths: int, forward_s: float) -> None:
        padded, seconds = self._padded(rows), forward_s - self.scale * paths * self._buckets.path_s
        often, average = self._seen.get(padded, (0, 0.0))
        often = min(often + 1, EMA_PASSES)
        self._seen[padded] = often, average + (seconds - average) / often
        self._rescale(forward_s / self._buckets.cost(rows, paths))

    def __call__(self, rows: int, paths: int = 0) -> float:
        expected = self.scale * self._buckets.cost(rows, paths)
        often, average = self._seen.get(self._padded(rows), (0, 0.0))
        beside = self.scale * paths * self._buckets.path_s
        return (PRIOR_WEIGHT * expected + often * (average + beside)) / (PRIOR_WEIGHT + often)


class InterpolatedCosts(PassCosts):
    """Of a few row counts: each tells of those beside it."""

    def __init__(self, buckets: TokenBuckets | BatchedTokenBuckets):
        super().__init__(buckets)
        self._told: dict[int, tuple[float, float]] = {}  # by padded rows: passes, and the sum of their scales
        self._table: list[float] = []  # seconds by rows, if they are known

    def observe(self, rows: int, paths: int, forward_s: float) -> None:
        ratio = forward_s / self._buckets.cost(rows, paths)
        ratio = min(ratio, LONGEST * self._scale) if self._scale else ratio
        self._told = {count: (_FORGET * n, _FORGET * total) for count, (n, total) in self._told.items()}
        passes, total = self._told.get(self._padded(rows), (0.0, 0.0))
        self._told[self._padded(rows)] = passes + 1, total + ratio
        self._rescale(ratio)
        self._table = []

    def __call__(self, rows: int, paths: int = 0) -> float:
        if not self._told:
            return self._buckets.cost(rows, paths)
        self._table = self._table or self._by_rows()
        return self._table[min(rows, LIMIT) - 1] + self.scale * paths * self._buckets.path_s

    def _by_rows(self) -> list[float]:
        """Seconds of 1, 2, ... rows; one costs no more than one of more rows.

        Between two counts that were read of late none is taken to cost more than in proportion: one that does is read
        once, and then it is known.
        """
        known = sorted(count for count, (passes, _) in self._told.items() if passes >= LEAST_PASSES)
        scales = [(self.scale + total) / (1 + passes) for passes, total in map(self._told.__getitem__, known)]
        padded = [self._padded(rows) for rows in range(1, LIMIT + 1)]
        expected = np.array([self._buckets.cost(rows) for rows in padded])
        found = np.interp(padded, known, scales) * expected
        seconds = [one * self._buckets.cost(count) for one, count in zip(scales, known, strict=True)]
        found = np.minimum(found, np.interp(padded, known, seconds, right=np.inf))
        rising: list[float] = np.minimum.accumulate(found[::-1])[::-1].tolist()
        return rising
