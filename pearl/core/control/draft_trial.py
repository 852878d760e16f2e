"""Whether drafting pays: found out by stopping it where it may not, and trying again, ever more rarely.

Both models share caches and memory, so what the target makes alone is known only from passes without a drafter.

    trial    passes with a drafter; then the verdict: probe, pause, or another trial that is twice as long
    probe    the first few passes without one, once: they show what the target makes alone
    pause    passes without one, each time twice as long; over once the target alone is slower than the trial was, as
             it is when sources beside it found much to repeat in a part of the text that has ended
"""

from __future__ import annotations

from collections import deque
from typing import Literal

TRIAL, LONGEST_TRIAL = 12, 96  # passes after which drafting is judged, doubled each time that it was worth it
PROBE = 6  # passes without drafting that show what the target makes alone
MOST = 4  # tokens of a pass that count: longer ones are repeated text, which sources beside the target find anyway
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # passes without drafting, doubled each time that it was not worth it
_FORGET = 0.9  # of what the target made alone, from pass to pass
MIN_SPEEDUP = 0.985  # drafting goes on at this many times the speed of the target alone: guesses come in bursts
RESUME_SPEEDUP, LATELY = 1.1, 6  # a pause is over where the last trial was so much faster than so many passes alone
CLEAR_SPEEDUP = 1.3  # times faster than the target was expected to be alone: no need for a probe


class DraftTrial:
    """`paused`: the target goes on alone for now."""

    def __init__(self) -> None:
        self._state: Literal["trial", "probe", "pause"] = "trial"
        # of passes without a drafter, moving sums: sources beside the target may go on guessing then
        self._alone_tokens = self._alone_seconds = 0.0
        self._tokens, self._seconds, self._passes = 0, 0.0, 0  # since drafting was last judged
        self._length = TRIAL  # of this trial, in passes
        self._drafted = 0.0  # tokens per second of the last trial
        self._lately: deque[tuple[int, float]] = deque(maxlen=LATELY)  # tokens and seconds of passes of this pause
        self._next_pause, self._left = FIRST_PAUSE, 0  # and passes that are left of this probe or pause
        self._drafter_idle = False  # it has finished the forward that it was in when the pause began

    @property
    def paused(self) -> bool:
        return self._state != "trial"

    def passed(self, committed: int, seconds: float, sequences: int, expected_s: float) -> None:
        """A pass of so many sequences is over. `expected_s`: what one without guesses was measured to take."""
        committed = min(committed, MOST * sequences)
        if self._state == "trial":
            self._passed_trial(committed, seconds, sequences / expected_s)
            return
        self._note_alone(committed, seconds)
        if self._state == "probe":
            self._passed_probe()
        else:
            self._passed_pause()

    def _passed_trial(self, committed: int, seconds: float, expected: float) -> None:
        """`expected`: tokens per second of the target alone, without any guess."""
        self._tokens, self._seconds, self._passes = self._tokens + committed, self._seconds + seconds, self._passes + 1
        if self._passes < self._length:
            return
        if not self._alone_seconds and self._tokens / self._seconds <= CLEAR_SPEEDUP * expected:
            self._stop("probe", PROBE)  # and then this trial is judged
        else:
            self._judge()

    def _passed_probe(self) -> None:
        if not self._left:
            self._judge()

    def _passed_pause(self) -> None:
        """It ends early if the target alone has become slower than drafting was. That may have been a few slow passes:
        what it makes alone is measured anew before drafting is judged again."""
        tokens, seconds = sum(t for t, _ in self._lately), sum(s for _, s in self._lately)
        early = len(self._lately) == LATELY and self._drafted * seconds > RESUME_SPEEDUP * tokens
        if early:
            self._alone_tokens = self._alone_seconds = 0.0
        if early or not self._left:
            self._state = "trial"

    def _note_alone(self, committed: int, seconds: float) -> None:
        if self._drafter_idle:
            self._alone_tokens = _FORGET * self._alone_tokens + committed
            self._alone_seconds = _FORGET * self._alone_seconds + seconds
            self._lately.append((committed, seconds))
        self._left, self._drafter_idle = self._left - 1, True

    def _judge(self) -> None:
        alone, drafted = self._alone_tokens * self._seconds, self._tokens * self._alone_seconds
        if not self._alone_seconds or drafted > MIN_SPEEDUP * alone:
            self._state = "trial"
            self._next_pause, self._length = FIRST_PAUSE, min(2 * self._length, LONGEST_TRIAL)
        else:
            self._stop("pause", self._next_pause)
            self._drafted = self._tokens / self._seconds
            self._next_pause, self._length = min(2 * self._next_pause, LONGEST_PAUSE), TRIAL
        self._tokens, self._seconds, self._passes = 0, 0.0, 0

    def _stop(self, state: Literal["probe", "pause"], passes: int) -> None:
        self._state, self._left, self._drafter_idle = state, passes, False
        self._lately.clear()
