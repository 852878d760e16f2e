"""How many rows a forward has, and what it costs: the plain half of batch invariance.

Knows: for which row counts the bits of a row's logits are equal (the buckets), to which of them a pass is padded,
and the seconds of each. Refuses to know: how that was found out (`pearl.models.batch_invariance`).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LIMIT = 16  # rows of a pass at most
LEAST = 2  # a single row goes through another kernel, and a short measurement may not meet a bit that tells
# The cache is read in multiples of this many slots. A sum over more slots may round otherwise even if the further ones
# count for nothing, so the pass that reads a token always sees as many as that token's own position asks for.
SLOT_MULTIPLE = 128
PREFILL_CHUNK = SLOT_MULTIPLE  # rows of one forward over a prompt at most: other sequences wait no longer than that
ROWS_A_TEXT = 5  # of a pass that many texts share, on average at most
LEAST_CONTEXT = 192  # tokens that every model must be able to read: texts that long are timed and compared at start
LEAVES = 8  # rows of a drafter's forward at most, once its text is read


@dataclass(frozen=True)
class TokenBuckets:
    """`safe`: row counts with equal bits, ascending. `cost_s[n - 1]`: seconds of a forward of n rows.
    `pad_to`: those of the safe ones that no wider one is faster than; (): all."""

    safe: tuple[int, ...]
    cost_s: tuple[float, ...]
    exact: bool = True  # False: the bits depend on the row count whatever is done
    branches: bool = True  # a row beside the chain has the bits that it would have in it
    path_s: float = 0.0  # seconds that a pass takes longer for each path beside its chain
    pad_to: tuple[int, ...] = ()

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TokenBuckets:
        """What `asdict` and JSON have made a mapping of."""
        return TokenBuckets(**_tuples(values))

    def pad(self, rows: int) -> int:
        """The least count worth its time that holds `rows`; beyond what was tested, as many as they are."""
        return next((count for count in self.pad_to or self.safe if count >= rows), rows)

    def least(self, rows: int) -> int:
        """The least safe count that holds `rows`, for an attention call of a part of a pass, which each row makes
        longer."""
        return next((count for count in self.safe if count >= rows), rows)

    @property
    def most(self) -> int:
        """The widest pass."""
        return self.safe[-1]

    @property
    def fixed(self) -> bool:
        """There is one width for all passes."""
        return self.exact and len(self.safe) == 1

    def cost(self, rows: int, paths: int = 0) -> float:
        """Seconds of a pass of so many rows, some of them on `paths` beside its chain."""
        return self.cost_s[min(self.pad(rows), LIMIT) - 1] + paths * self.path_s

    def up_to(self, position: int) -> int:
        """The most rows of a pass whose root is at `position`: it does not cross a multiple of `SLOT_MULTIPLE`."""
        return SLOT_MULTIPLE - position % SLOT_MULTIPLE


@dataclass(frozen=True)
class BatchedTokenBuckets:
    """The row counts of forwards that several texts share, at which each text's rows have the bits that they have in a
    forward of its own; ascending. `cost_s`: the seconds of each; `path_s`: see `TokenBuckets`."""

    counts: tuple[int, ...]
    cost_s: tuple[float, ...]
    path_s: float = 0.0

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> BatchedTokenBuckets:
        return BatchedTokenBuckets(**_tuples(values))

    def pad(self, rows: int) -> int:
        """The least of the counts that holds `rows`."""
        assert rows <= self.most, "no forward that wide was tried"
        return self.counts[bisect.bisect_left(self.counts, rows)]

    @property
    def most(self) -> int:
        return self.counts[-1]

    def cost(self, rows: int, paths: int = 0) -> float:
        """Seconds of a pass of so many rows, some of them on `paths` beside the chains."""
        return self.cost_s[bisect.bisect_left(self.counts, min(rows, self.most))] + paths * self.path_s


@dataclass(frozen=True)
class Check:
    """A fact about bits that was tried on this machine."""

    what: str
    holds: bool
    found: str


class CannotBranch(Exception):
    """The model's attention does not read the cached keys themselves."""


ANY = TokenBuckets(tuple(range(1, LIMIT + 1)), (1.0,) * LIMIT)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where we have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def extended(seconds: Sequence[float], rows: int) -> float:
    """The cost of so many rows where that of 1, 2, ... is known: beyond, each costs the mean step between those."""
    known = len(seconds)
    step = seconds[-1] - seconds[0] if known > 1 else 0.0
    return seconds[min(rows, known) - 1] + max(0, rows - known) * max(0.0, step) / max(1, known - 1)
