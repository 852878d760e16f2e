"""What a pass costs: what was measured at loading, drawn to what such passes have taken since.

A measurement on a busy machine has the wrong shape and not only the wrong size: a count that happened to be timed in a
quiet moment looks cheap. So passes correct each row count by itself, and counts between two that were read by both of
them. Else one that looks dear would never be tried, and one that looks cheap would be the only one that is known.
"""

from __future__ import annotations

import numpy as np

from pearl.core.control.averages import ema
from pearl.core.token_buckets import LIMIT, BatchedTokenBuckets, TokenBuckets

PRIOR_WEIGHT = 2  # what a pass cost at loading counts as much as this many passes
EMA_PASSES = 8  # the last so many make an average
LONGEST = 2.0  # times as long as usual: what made a pass longer than that was not its rows
LEAST_PASSES = 0.5  # a row count that was last read longer ago than that is not asked
_SCALE_WEIGHT = 0.1  # of one more pass in how many times as long they take as at loading
_FORGET = 0.97  # of what was told, from pass to pass


class PassCosts:
    """Seconds of a pass by its rows."""

    def __init__(self, buckets: TokenBuckets | BatchedTokenBuckets, by_count: bool):
        """`by_count`: row counts are too many to tell of each other, so each has an average of its own."""
        self._buckets, self._by_count = buckets, by_count
        self._scale: float | None = None  # a pass costs this many times what was measured at loading
        self._seen: dict[int, tuple[int, float]] = {}  # by padded rows: how many passes, their average
        self._told: dict[int, tuple[float, float]] = {}  # by padded rows: passes, and the sum of their scales
        self._table: list[float] = []  # seconds by rows, if they are known

    def observe(self, rows: int, paths: int, forward_s: float) -> None:
        ratio, scale = forward_s / self._buckets.cost(rows, paths), self._scale
        padded = self._padded(rows)
        if self._by_count:
            seconds = forward_s - (1.0 if scale is None else scale) * paths * self._buckets.path_s
            often, average = self._seen.get(padded, (0, 0.0))
            often = min(often + 1, EMA_PASSES)
            self._seen[padded] = often, average + (seconds - average) / often
        else:
            self._told = {count: (_FORGET * n, _FORGET * total) for count, (n, total) in self._told.items()}
            passes, total = self._told.get(padded, (0.0, 0.0))
            ratio = min(ratio, LONGEST * scale) if scale else ratio
            self._told[padded] = passes + 1, total + ratio
        self._scale = ratio if scale is None else ema(scale, ratio, weight=_SCALE_WEIGHT)
        self._table = []

    def __call__(self, rows: int, paths: int = 0) -> float:
        """Of a pass of so many rows, some of them on `paths` beside its chains."""
        scale = 1.0 if self._scale is None else self._scale
        if self._told:
            self._table = self._table or self._by_rows(scale)
            return self._table[min(rows, LIMIT) - 1] + scale * paths * self._buckets.path_s
        expected = scale * self._buckets.cost(rows, paths)
        if not self._seen:
            return expected
        often, average = self._seen.get(self._padded(rows), (0, 0.0))
        beside = scale * paths * self._buckets.path_s
        return (PRIOR_WEIGHT * expected + often * (average + beside)) / (PRIOR_WEIGHT + often)

    def _by_rows(self, scale: float) -> list[float]:
        """Seconds of 1, 2, ... rows; one costs no more than one of more rows.

        Between two counts that were read of late none is taken to cost more than in proportion: one that does is read
        once, and then it is known.
        """
        known = sorted(count for count, (passes, _) in self._told.items() if passes >= LEAST_PASSES)
        scales = [(scale + total) / (1 + passes) for passes, total in map(self._told.__getitem__, known)]
        padded = [self._padded(rows) for rows in range(1, LIMIT + 1)]
        expected = np.array([self._buckets.cost(rows) for rows in padded])
        found = np.interp(padded, known, scales) * expected
        seconds = [one * self._buckets.cost(count) for one, count in zip(scales, known, strict=True)]
        found = np.minimum(found, np.interp(padded, known, seconds, right=np.inf))
        rising: list[float] = np.minimum.accumulate(found[::-1])[::-1].tolist()
        return rising

    def _padded(self, rows: int) -> int:
        return self._buckets.pad(min(rows, self._buckets.most))
