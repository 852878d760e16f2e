"""Two ends in one process count what they say as two processes would."""

from __future__ import annotations

from pearl.core.messages import DraftPlan, End, Guess, Nodes, Verdict
from pearl.wire.channel import LocalChannel
from pearl.wire.frames import size


def test_bytes_are_counted_both_ways():
    here, there = LocalChannel.pair()
    down, up = [Verdict(1, 5, DraftPlan(), tuple(range(40)))], [Nodes(1, 1, 1, False, (Guess(2, 1, 7),)), End(1)]
    here.send(*down)
    there.send(*up)
    assert here.bytes_sent == there.bytes_received == size(*down) > 0
    assert there.bytes_sent == here.bytes_received == size(*up) > 0
    assert [there.receive()] == down and [here.receive(), here.receive()] == up


def test_an_end_that_waits_lets_the_other_one_work():
    here, there = LocalChannel.pair()
    steps = iter([lambda: None, lambda: there.send(End(1)), lambda: there.send(End(2))])

    def work() -> bool:
        next(steps)()
        return True

    here.peer_step = work
    here.wait()
    assert here.receive() == End(1) and here.receive() is None, "it works until something is there, and no longer"
