"""Whether a source beside the target is worth its time, which is the target's own.

A guess of it that came true is worth the time that a token takes at the rate of the run; against that stand the
seconds that the source has worked and those that its rows have added to passes. Over a number of passes the one has to
be more than the other, else the source rests, each time twice as long, and is tried again.
"""

from __future__ import annotations

FIRST_TRIAL, TRIAL = 48, 24  # passes after which a source is judged; at first it has something to learn
FIRST_REST, LONGEST_REST = 16, 512  # passes


class SourceTrial:
    """`resting`: the source is not asked for now."""

    def __init__(self) -> None:
        self._gain_s = self._cost_s = 0.0
        self._left = FIRST_TRIAL  # passes of this trial, or of this rest
        self._next_rest = FIRST_REST
        self.resting = False

    def spent(self, seconds: float) -> None:
        """The source has worked for so long."""
        self._cost_s += seconds

    def passed(self, right: int, row_s: float, rate: float) -> None:
        """A pass is over: so many of its guesses came true, its rows made the pass so much longer, and the run makes
        `rate` tokens per second."""
        self._gain_s += right / rate
        self._cost_s += row_s
        self._left -= 1
        if self._left > 0:
            return
        if self.resting or self._gain_s >= self._cost_s:
            self._next_rest = self._next_rest if self.resting else FIRST_REST
            self.resting, self._left = False, TRIAL
        else:
            self.resting, self._left = True, self._next_rest
            self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        self._gain_s = self._cost_s = 0.0
