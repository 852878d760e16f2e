"""Two clocks that differ, and beats that take their time: the difference is known as well as the ways allow."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pearl.core.messages import Beat
from pearl.wire.peer_clock import PeerClock


class Machines:
    """Two of them, on a time that this test turns."""

    def __init__(self, ahead_s: float, drift: float = 0.0):
        self.now = 1000.0
        self.here = PeerClock(lambda: self.now)
        self.there = PeerClock(lambda: self.now * (1 + drift) + ahead_s)

    def exchange(self, *ways_s: float) -> None:
        """Beats in turn, the first from here."""
        ends = self.here, self.there
        for number, seconds in enumerate(ways_s):
            said = ends[number % 2].beat()
            self.now += seconds
            ends[1 - number % 2].hear(said)


WAYS = st.lists(st.floats(1e-5, 2.0), min_size=3, max_size=30)


@given(st.floats(-1e6, 1e6), WAYS)
def test_the_difference_is_wrong_by_half_of_the_quickest_exchange_at_most(ahead_s, ways):
    machines = Machines(ahead_s)
    machines.exchange(*ways)
    for end, sign in ((machines.here, 1), (machines.there, -1)):
        quickest = min(way for way, _ in end._exchanges)
        assert abs(end.ahead_s() - sign * ahead_s) <= quickest + 1e-6


@given(WAYS)
def test_one_clock_has_no_difference(ways):
    machines = Machines(0.0)
    machines.exchange(*ways)
    assert machines.here.ahead_s() == machines.there.ahead_s() == 0.0


def test_clocks_that_drift_are_followed():
    machines, rng = Machines(50.0, drift=1e-4), random.Random(0)
    for _ in range(200):
        machines.exchange(rng.uniform(1e-4, 3e-4), rng.uniform(1e-4, 3e-4))
        machines.now += 2.0
    assert machines.here.ahead_s() == pytest.approx(50.0 + machines.now * 1e-4, abs=3e-3)


@pytest.mark.parametrize("sent", [math.nan, math.inf, -math.inf, 1e300])
def test_times_that_are_none_say_nothing(sent):
    clock = PeerClock(lambda: 5.0)
    assert clock.ahead_s() == 0.0, "before any exchange"
    clock.hear(Beat(0, sent, 1.0, 2.0))
    clock.hear(Beat(0, 2.0, 1.0, sent))
    assert math.isfinite(clock.ahead_s())
