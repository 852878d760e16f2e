"""How long the target waits for a first guess that is not there yet, where the schedule asks for none.

A pass that reads the root alone tells whether the first guess is right, as it comes meanwhile (pre-verify), and the
next pass reads those that follow. So waiting for it saves a pass only where it is right and the second is wrong: if
that is worth the wait, it is waited for. Else there is a short wait now and then, for a source that answers at once,
and ever more rarely where nothing came of it.
"""

from __future__ import annotations

from pearl.core.control.averages import ema

WAIT_FACTOR = 3  # times as long as usual: no guess is waited for any longer
SHORT_WAIT_FRACTION = 0.02  # of a pass: the short wait
_WAIT_WEIGHT = 0.1  # of one more wait in how long they usually are
RAREST_SHORT_WAIT = 64  # passes from one to the next


class WaitPolicy:
    """Learns how long first guesses take to come."""

    def __init__(self) -> None:
        self._usual_s = 0.0  # until the first guess after a miss comes
        self._every = self._in = 1  # passes until a short wait is tried again

    def expect(self, draft_s: float) -> None:
        """Before anything was waited for: the time of a drafter forward."""
        self._usual_s = 1.5 * draft_s

    def waited(self, came: bool, seconds: float) -> None:
        self._usual_s = ema(self._usual_s, seconds, weight=_WAIT_WEIGHT)
        self._every = 1 if came else min(2 * self._every, RAREST_SHORT_WAIT)
        self._in = self._every

    def take_budget(self, acceptance: float, pass_s: float, lacking: int, sequences: int, known: bool) -> float:
        """Seconds worth waiting now, where so many of the sequences of a pass of `pass_s` seconds have no guess.
        Each call counts towards the next short wait. `known`: whether the drafter has said what its forwards cost."""
        worth = acceptance * (1 - acceptance) * pass_s * lacking / sequences
        if known and worth > self._usual_s:
            return WAIT_FACTOR * self._usual_s
        self._in -= 1
        return 0.0 if self._in > 0 else SHORT_WAIT_FRACTION * pass_s
