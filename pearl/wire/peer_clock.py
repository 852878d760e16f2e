"""The other side's clock as ours shows it, found out from beats as NTP does (Mills et al., RFC 5905, section 8).

Each beat says when it left, which beat of ours was the last to arrive there, and when. With the moment at which it
comes here these are four times of a way there and back. Half of what the ways take is the most that the difference of
the clocks may be wrong by, so the quickest of the last exchanges counts. Where no difference at all is possible within
that, as it always is on one machine, there is none: two processes that share a clock keep their times to the bit.

Knows: four times. Refuses to know: connections.
"""

from __future__ import annotations

import math
import time
from collections import deque

from pearl.core.messages import Beat
from pearl.wire.channel import Clock

_EXCHANGES = 8  # that are remembered: clocks drift by some millionths


class PeerClock:
    """`hear` is the receiver's, `beat` may be another thread's."""

    def __init__(self, clock: Clock = time.perf_counter):
        self._clock = clock
        self._last = 0.0, 0.0  # the last beat that came: when it had left, by their clock, and when it came, by ours
        self._exchanges: deque[tuple[float, float]] = deque(maxlen=_EXCHANGES)  # seconds on both ways, and ahead

    def beat(self) -> Beat:
        """What is to be sent now."""
        return Beat(0, self._clock(), *self._last)

    def hear(self, beat: Beat) -> None:
        """It has just come."""
        now = self._clock()
        self._last = beat.sent, now
        on_the_way = (now - beat.echoed) - (beat.sent - beat.heard)
        ahead = ((beat.heard - beat.echoed) + (beat.sent - now)) / 2
        if beat.heard and math.isfinite(ahead) and 0 <= on_the_way < math.inf:
            self._exchanges.append((on_the_way, ahead))

    def ahead_s(self) -> float:
        """How much later it is there than here; 0 where it may be one clock."""
        on_the_way, ahead = min(self._exchanges, default=(0.0, 0.0))
        return ahead if abs(ahead) > on_the_way / 2 else 0.0
