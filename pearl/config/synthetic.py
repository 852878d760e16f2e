"""What a synthetic draft is asked to be: how often its guesses are right, and how long one takes.

    synthetic:0.8            every guess is right with this chance
    synthetic:0.9,0.8,0.7    the first guess below the root, the second, and all after it
    synthetic:0.8/0.5        where it is wrong, a second guess beside it (in a tree) is right with this chance
    synthetic:0.8@5ms        a forward takes so long (ms, us or s); without it no time at all

Plain data, no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pearl.errors import UsageError

SYNTHETIC = "synthetic"
_TIME = re.compile(r"([0-9.e+-]+)\s*(us|ms|s)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LONGEST_S = 60.0


@dataclass(frozen=True)
class SyntheticDraft:
    chances: tuple[float, ...]  # by depth below the root; the last one holds for all below it
    forward_s: float = 0.0
    correction: float = 0.0  # the chance of a second guess where the first is wrong

    @staticmethod
    def of(word: object) -> SyntheticDraft | None:
        """None: it names another draft. Raises `UsageError` for a synthetic one that can't be meant."""
        if not isinstance(word, str) or not (word == SYNTHETIC or word.startswith(f"{SYNTHETIC}:")):
            return None
        numbers, at, time = word.removeprefix(SYNTHETIC).removeprefix(":").partition("@")
        numbers, beside, second = numbers.partition("/")
        try:
            chances = tuple(float(number) for number in numbers.split(","))
            correction = float(second) if beside else 0.0
            if not all(0.0 <= chance <= 1.0 for chance in (*chances, correction)):
                raise ValueError("not a chance")
            found = _TIME.fullmatch(time.strip())
            forward_s = float(found[1]) * _UNITS[found[2]] if found else math.nan
            if at and not 0 <= forward_s <= _LONGEST_S:
                raise ValueError("not a time")
        except ValueError:
            raise UsageError(
                f"The draft {word[:80]!r} must be like synthetic:0.8, synthetic:0.9,0.8,0.7 (chances from 0 to 1, by "
                "depth), synthetic:0.8/0.5 (with that of a correction) or synthetic:0.8@5ms (the time of a forward)."
            ) from None
        return SyntheticDraft(chances, forward_s if at else 0.0, correction)

    def chance(self, depth: int) -> float:
        """Of a guess `depth` below the root, 1 the first."""
        return self.chances[min(depth, len(self.chances)) - 1]
