"""What a pass costs: what was measured at loading, drawn to what such passes have taken since."""

from __future__ import annotations

from pearl.core.token_buckets import BatchedTokenBuckets, TokenBuckets

PRIOR_WEIGHT = 2  # what a pass cost at loading counts as much as this many passes
EMA_PASSES = 8  # the last so many make an average


class PassCosts:
    """Seconds of a pass by its rows."""

    def __init__(self, buckets: TokenBuckets | BatchedTokenBuckets, by_count: bool):
        """`by_count`: each row count has an average of its own; else one factor serves all of them."""
        self._buckets, self._by_count = buckets, by_count
        self._scale: float | None = None  # a pass costs this many times what was measured at loading
        self._seen: dict[int, tuple[int, float]] = {}  # by padded rows: how many passes, their average

    def observe(self, rows: int, paths: int, forward_s: float) -> None:
        ratio, scale = forward_s / self._buckets.cost(rows, paths), self._scale
        if self._by_count:
            seconds = forward_s - (1.0 if scale is None else scale) * paths * self._buckets.path_s
            often, average = self._seen.get(self._padded(rows), (0, 0.0))
            often = min(often + 1, EMA_PASSES)
            self._seen[self._padded(rows)] = often, average + (seconds - average) / often
        self._scale = ratio if scale is None else scale + 0.1 * (ratio - scale)

    def __call__(self, rows: int, paths: int = 0) -> float:
        """Of a pass of so many rows, some of them on `paths` beside its chains."""
        scale = 1.0 if self._scale is None else self._scale
        expected = scale * self._buckets.cost(rows, paths)
        if not self._seen:
            return expected
        often, average = self._seen.get(self._padded(rows), (0, 0.0))
        beside = scale * paths * self._buckets.path_s
        return (PRIOR_WEIGHT * expected + often * (average + beside)) / (PRIOR_WEIGHT + often)

    def _padded(self, rows: int) -> int:
        return self._buckets.pad(min(rows, self._buckets.most))
