"""A drafter that is late, stuck, garbled or gone, in virtual time: the text is the same, and no wait is long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import batch_cases
import numpy as np
import pytest
from cases import DRAFTING, Case, cases, plain_case
from hypothesis import given
from hypothesis import strategies as st
from tiers import tiered
from toys import EAGER, Move, ScriptedChannel, WatchedTarget, alone, examples, together

from pearl.core.messages import Close, Costs, DraftPlan, DraftStats, End, Guess, Message, Nodes, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.errors import Unreachable, UsageError
from pearl.roles.target import Target
from pearl.wire import reconnecting_channel
from pearl.wire.reconnecting_channel import BACK_OFF_S, DrafterEvent, ReconnectingChannel

DEADLINE_S = 0.25


class Time:
    """Goes on a little whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-5
        return self.now


class Doomed(ScriptedChannel):
    """A wire to a drafter to which something happens after so many moves.

    killed   it is gone, and what it had sent        cut      it is gone; what it had sent arrives
    stopped  it does nothing any more                paused   it does nothing for ten moves
    garbled  what it says is no drafter's
    """

    def __init__(self, source, script: Sequence[Move], kind: str, moves: int, time: Time):
        super().__init__(source, script)
        self.kind, self.until, self.time = kind, moves, time
        self.reason = ""
        self.waited: list[float] = []
        self.closed = False

    def _move(self, down: int, steps: int, up: int) -> bool:
        self.until -= 1
        if self.until < 0:
            if self.kind in ("killed", "cut"):
                if self.kind == "cut":
                    self.deliver(99)
                self.gone = True
                self.coming.clear()
                return False
            if self.kind == "stopped" or (self.kind == "paused" and self.until > -10):
                return False
            if self.kind == "garbled" and self.until == -1:
                self.inbox.append(garbage(self.drafter, self.time))
        return super()._move(down, steps, up)

    def wait(self, timeout_s: float | None = None) -> None:
        assert timeout_s is not None, "nothing is waited for without a limit"
        began = self.time.now
        self._move(*next(self._script))
        patient = timeout_s >= DEADLINE_S / 2
        while not self.inbox and not self.gone:
            if not (patient and self._move(1, 1, 1)):
                self.time.now += timeout_s
                break
        self.waited.append(self.time.now - began)

    def abort(self, reason: str) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True


GARBAGE: Sequence[Callable[[int], Message]] = (
    lambda at: Nodes(at, 0, 0, False, (Guess(1, 0, 999),)),
    lambda at: Nodes(at, 0, 0, False, (Guess(1, 0, -1),)),
    lambda at: Nodes(at, 0, 0, False, (Guess(1, 0, 1, (), 3.0),)),
    lambda at: Nodes(at, 0, 0, False, (Guess(1, 0, 1, (), math.nan),)),
    lambda at: Nodes(at, 0, 0, False, (Guess(1, 0, 1, ((1, 2.0),)),)),
    lambda at: Nodes(at, 0, 1 << 20, False),
    lambda at: Nodes(at, 0, -1, False),
    lambda at: Costs(at, (math.nan,)),
    lambda at: Verdict(at, 3, DraftPlan(), (1,)),
)


def garbage(drafter, time: Time) -> Message:
    return GARBAGE[int(time.now * 1e5) % len(GARBAGE)](1)


KINDS = ("killed", "cut", "stopped", "paused", "garbled")


class Fate:
    """What happens to one drafter after the other; those after the last are well."""

    def __init__(self, case: Case | batch_cases.Case, script: Sequence[Move], fates: Sequence[tuple[str, int]]):
        self.case, self.script, self.fates, self.time = case, script, fates, Time()
        self.made: list[Doomed] = []
        self.later: list[Callable[[], None]] = []
        self.said: list[str] = []

    def reach(self, number: int) -> Doomed:
        kind, moves = self.fates[number] if number < len(self.fates) else ("well", 0)
        if kind == "absent":
            raise Unreachable("nobody there")
        if kind == "unforeseen":  # as starting a process does where memory is short
            raise OSError(12, "Cannot allocate memory")
        self.made.append(Doomed(self.case.make_source(), self.script, kind, moves, self.time))
        return self.made[-1]

    def lifeline(self, at_once: bool = True, **options) -> ReconnectingChannel:
        def run(work: Callable[[], None]) -> None:
            work() if at_once else self.later.append(work)

        made = ReconnectingChannel(
            self.reach,
            self.case.vocabulary,
            DEADLINE_S,
            clock=self.time,
            run=run,
            tell=self.said.append,
            **{"restarts": 99, **options},
        )
        return made


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch):
    monkeypatch.setattr("pearl.wire.reconnecting_channel.BACK_OFF_S", 0.0)


FATES = st.lists(st.tuples(st.sampled_from((*KINDS, "absent")), st.integers(0, 25)), min_size=1, max_size=4)


@examples(60)
@given(cases(modes=DRAFTING), FATES)
def test_whatever_happens_to_its_drafters_the_text_is_the_targets_own(case: Case, fates):
    fate = Fate(case, case.script, fates)
    channel = fate.lifeline()
    target = Target(case.model, channel, fate.time)
    for _ in range(2):
        before = fate.time.now
        written = together(target, case.prompt, case.schedule, case.params, case.eos)
        assert written == alone(case.model, case.prompt, case.params, case.eos)
        longest = max(p.forward_s for p in target.passes) + DEADLINE_S
        waits = [wait for wire in fate.made for wait in wire.waited]
        assert max(waits, default=0.0) <= longest + 0.1
        # so many long waits at most as there were drafters to wait for, and one at the end for a report
        assert fate.time.now - before <= (len(fates) + 2) * (longest + 0.1) * 2 + 0.01 * len(target.passes)


@pytest.mark.parametrize("mode", DRAFTING)
@pytest.mark.parametrize("kind", tiered(["killed", "cut", "garbled"], lambda kind: kind == "killed"))
def test_after_a_loss_the_next_drafter_goes_on_where_the_text_is(mode: str, kind: str):
    case = plain_case(mode, 3, "right", tokens=60)
    replayed = 0
    for moves in range(4, 120, 9):
        fate = Fate(case, EAGER, [(kind, moves)])
        target = Target(case.model, fate.lifeline(), fate.time)
        together(target, case.prompt, case.schedule, case.params)
        if len(fate.made) > 1 and [type(one) for one in fate.made[1].sent[:2]] == [Start, Verdict]:
            told = len(fate.made[1].sent[1].tokens)
            accepted = sum(p.accepted for p in target.passes if p.position > len(case.prompt) + told)
            replayed += told > 4 and accepted > 0
    assert replayed, "no drafter that came back in the middle was right again"


@examples(40)
@given(batch_cases.cases(modes=DRAFTING), FATES)
def test_texts_side_by_side_are_the_targets_own_whatever_happens_to_their_drafters(case: batch_cases.Case, fates):
    fate = Fate(case, case.script, fates)
    target, _ = batch_cases.check(case, target=WatchedTarget(case.model, fate.lifeline(), fate.time))
    longest = max(turn.seconds for turn in target.turns)
    assert max((wait for wire in fate.made for wait in wire.waited), default=0.0) <= longest + DEADLINE_S + 0.1
    assert len([wait for wire in fate.made for wait in wire.waited if wait > DEADLINE_S / 2]) <= 2 * len(fates) + 2


@pytest.mark.parametrize("mode, kind", [("sd", "garbled"), ("pearl", "killed"), ("pearl-no-post", "cut")])
def test_every_text_under_way_is_told_to_the_next_drafter(mode: str, kind: str):
    """Those that are over are not; and in each that is not, guesses are accepted again."""
    params = [SamplingParams(max_new_tokens=30 + 9 * place, seed=0) for place in range(3)]
    asked = [batch_cases.Asked((place, 1), one, 0) for place, one in enumerate(params)]
    case = batch_cases.Case(
        vocabulary=4,
        order=2,
        table=5,
        eos=frozenset(),
        asked=tuple(asked),
        places=3,
        schedule=Schedule.of(mode, 3),
        source="right",
        chance=1.0,
        chunk=2,
        script=tuple(EAGER),
    )
    replayed = 0
    for moves in range(6, 70, 9):
        fate = Fate(case, EAGER, [(kind, moves)])
        _, texts = batch_cases.check(case, target=Target(case.model, fate.lifeline(), fate.time))
        again = fate.made[1].sent if len(fate.made) > 1 else []
        if [type(one) for one in again[:6]] != [Start, Verdict] * 3:
            continue
        for text, verdict in zip(texts, again[1:6:2], strict=True):
            told = len(verdict.tokens)
            assert tuple(text.stopper.tokens[:told]) == verdict.tokens
            replayed += sum(p.accepted for p in text.passes if p.position > 2 + told) > 0
    assert replayed >= 3, "no three texts were under way when a drafter came back"


@pytest.mark.parametrize("mode", DRAFTING)
def test_a_drafter_that_stops_for_good_is_waited_for_once(mode: str):
    case = plain_case(mode, 3, "right", tokens=60)
    fate = Fate(case, EAGER, [("stopped", 12)])
    target = Target(case.model, fate.lifeline(), fate.time)
    together(target, case.prompt, case.schedule, case.params)
    assert sum(p.waited_s > DEADLINE_S / 2 for p in target.passes) <= 1
    assert not any(p.accepted for p in target.passes[-3:])


def test_a_drafter_that_comes_back_is_told_only_the_texts_under_way():
    case = plain_case("pearl", "auto", "right")
    fate = Fate(case, EAGER, [("well", 0)])
    channel = fate.lifeline(at_once=False)
    fate.later.pop()()
    target = Target(case.model, channel, fate.time)
    together(target, case.prompt, case.schedule, case.params)
    fate.made[0].gone = True
    assert channel.lost
    fate.later.pop()()
    assert not channel.lost
    assert fate.made[1].sent == [] and fate.made[0].closed
    assert [event.kind for event in channel.events] == ["lost", "back"]


def replaced(channel: ReconnectingChannel) -> None:
    """Takes what is left of a lost drafter; the next look finds the new one."""
    while channel.receive() is not None:
        pass
    assert channel.lost or channel.events
    assert not channel.lost and channel.events[-1].kind == "back"


def test_features_are_told_again_in_their_order():
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline()
    features = [np.full((count, 3), count, np.int16) for count in (2, 1, 4)]
    start = Start(7, Schedule.of("pearl"), SamplingParams(seed=0), (1, 2), DraftPlan())
    channel.send(start)
    for place, one in enumerate(features):
        channel.send(Verdict(7, 2 + place, DraftPlan(max_depth=place), (place,), one))
    fate.made[0].gone = True
    replaced(channel)
    channel.send(Verdict(7, 5, DraftPlan(max_depth=9), (3,)))
    again = fate.made[1].sent
    assert again[:2] == [start, Verdict(7, 4, DraftPlan(max_depth=2), (0, 1, 2))]
    assert np.array_equal(again[1].features, np.concatenate(features))
    assert again[2] == Verdict(7, 5, DraftPlan(max_depth=9), (3,))


def test_names_of_two_drafters_are_never_the_same():
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline()
    channel.send(Start(1, Schedule.of("pearl"), SamplingParams(seed=0), (1, 2), DraftPlan()))
    said = Nodes(1, 0, 1, False, (Guess(1, 0, 3),))
    fate.made[0].inbox.append(said)
    first = channel.receive()
    fate.made[0].gone = True
    replaced(channel)
    fate.made[1].inbox.append(said)
    second = channel.receive()
    assert first == said and second.position == said.position
    assert {first.root, first.guesses[0].id}.isdisjoint({second.root, second.guesses[0].id})
    assert second.guesses[0].parent == second.root


@pytest.mark.parametrize("message", [make(1) for make in GARBAGE], ids=lambda m: type(m).__name__)
def test_what_no_drafter_says_ends_the_connection(message):
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0), ("absent", 0)])
    channel = fate.lifeline(restarts=1)
    channel.send(Start(1, Schedule.of("pearl"), SamplingParams(seed=0), (1, 2), DraftPlan()))
    fate.made[0].inbox += [message, Nodes(1, 0, 1, False)]
    assert channel.receive() is None and channel.lost
    assert [event.kind for event in channel.history()] == ["lost", "lost", "alone"]


def test_a_drafter_is_late_once_and_heard_once():
    fate = Fate(plain_case("sd", 1, "right"), [(0, 0, 0)], [("stopped", 0)])
    channel = fate.lifeline()
    for round in range(3):
        channel.send(Start(round, Schedule.of("sd"), SamplingParams(seed=0), (1, 2), DraftPlan()))
        before = fate.time.now
        channel.wait()
        assert DEADLINE_S <= fate.time.now - before < DEADLINE_S + 0.1
        assert channel.lost
        channel.wait()  # not again
        assert fate.time.now - before < DEADLINE_S + 0.1
        fate.made[0].inbox.append(Nodes(round, 0, 1, False))
        assert channel.receive() == Nodes(round, 0, 1, False) and not channel.lost
    assert [event.kind for event in channel.events] == ["late", "heard"] * 3
    assert len(fate.said) == 2  # on the terminal each once


def test_that_a_drafter_is_lost_is_kept_however_often_it_was_late(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconnecting_channel, "_REMEMBERED", 3)
    fate = Fate(plain_case("sd", 1, "right"), [(0, 0, 0)], [("stopped", 0)])
    channel = fate.lifeline()
    for round in range(3):
        channel.send(Start(round, Schedule.of("sd"), SamplingParams(seed=0), (1, 2), DraftPlan()))
        channel.wait()
        fate.made[0].inbox.append(Nodes(round, 0, 1, False))
        channel.receive()
    channel._event("lost", "the drafter is lost")
    assert [event.kind for event in channel.events] == ["late", "heard", "late", "lost"]


def test_a_short_wait_makes_nobody_late():
    fate = Fate(plain_case("pearl", 1, "right"), [(0, 0, 0)], [("stopped", 0)])
    channel = fate.lifeline()
    for _ in range(50):
        channel.wait(0.01)
    assert not channel.lost and channel.events == []


def test_the_report_of_an_ended_text_is_waited_for_as_long_as_its_longest_pass_took():
    fate = Fate(plain_case("pearl", 1, "right"), [(0, 0, 0)], [("stopped", 0)])
    channel = fate.lifeline()
    channel.send(Start(1, Schedule.of("pearl"), SamplingParams(seed=0), (1, 2), DraftPlan()))
    for seconds in (5.0, 0.1, 0.1, 0.1):
        fate.time.now += seconds
        channel.send(Verdict(1, 2, DraftPlan(), (1,)))
    assert abs(channel._limit.seconds(True) - DEADLINE_S - 0.1) < 0.01
    channel.send(End(1))
    before = fate.time.now
    channel.wait(60.0)
    assert abs(fate.time.now - before - DEADLINE_S - 5.0) < 0.1
    assert channel.lost


def test_a_report_that_a_lost_drafter_owed_is_asked_of_the_next_one():
    """It knows nothing of the text and says so: nobody waits for what will never come."""
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline()
    for sequence in (1, 2):
        channel.send(Start(sequence, Schedule.of("pearl"), SamplingParams(seed=0), (1, 2), DraftPlan()))
    channel.send(End(1), Verdict(2, 2, DraftPlan(), (1,)))
    fate.made[0].gone = True
    said = [channel.receive() for _ in range(200)]
    assert [type(one) for one in fate.made[1].sent] == [Start, Verdict, End]
    assert DraftStats(1) in [replace(one, memory=0) for one in said if isinstance(one, DraftStats)]


def test_messages_that_travel_together_are_of_one_pass():
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline()
    for sequence in range(8):
        channel.send(Start(sequence, Schedule.of("pearl"), SamplingParams(seed=0), (1, 2), DraftPlan()))
    for place in range(3):
        fate.time.now += 2.0
        channel.send(*(Verdict(sequence, 2 + place, DraftPlan(), (1,)) for sequence in range(8)))
    assert abs(channel._limit.seconds(True) - DEADLINE_S - 2.0) < 0.01


def test_what_belongs_to_a_text_that_is_over_is_not_heard():
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline()
    fate.made[0].inbox += [Nodes(5, 0, 1, False), DraftStats(5)]
    assert channel.receive() is None and not channel.lost


def test_a_drafter_that_can_not_start_is_refused_and_one_that_is_gone_is_not():
    def never(number: int):
        raise UsageError("no such model")

    with pytest.raises(UsageError, match="no such model"):
        ReconnectingChannel(never, 5, run=lambda work: work(), tell=lambda line: None).settle()
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("absent", 0)])
    channel = fate.lifeline()
    channel.settle()
    assert not channel.lost and [event.kind for event in channel.events] == ["lost", "back"]


@pytest.mark.parametrize("fates", [[("unforeseen", 0)], [("well", 0), ("unforeseen", 0)]], ids=["first", "later"])
def test_an_attempt_that_fails_as_nobody_foresaw_is_made_again(fates):
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, fates)
    channel = fate.lifeline()
    channel.settle()
    if len(fates) > 1:
        fate.made[0].gone = True
        channel.receive()
    assert not channel.lost and [event.kind for event in channel.events] == ["lost"] * len(fates) + ["back"]
    assert "Cannot allocate memory" in channel.events[-2].what


def test_attempts_end_and_pauses_between_them_grow(monkeypatch):
    monkeypatch.setattr("pearl.wire.reconnecting_channel.BACK_OFF_S", BACK_OFF_S)
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("absent", 0)] * 9)
    pauses: list[float] = []
    given_up: list[bool] = []
    channel = fate.lifeline(at_once=False, restarts=5, give_up=lambda: given_up.append(True))
    monkeypatch.setattr(channel._closing, "wait", pauses.append)
    fate.later.pop()()
    assert channel.lost and fate.later == []
    assert [event.kind for event in channel.events] == ["lost"] * 6 + ["alone"]
    assert pauses == [BACK_OFF_S * more for more in (1, 4, 16, 64, 64)]
    assert given_up == [True]


def test_events_say_when():
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline(restarts=0)
    fate.time.now += 3
    fate.made[0].gone = True
    fate.made[0].reason = "it was silent for too long"
    lost, alone_now = channel.history()
    assert lost == DrafterEvent(
        3.0, "lost", "the drafter is lost (it was silent for too long); the target goes on alone"
    )
    assert alone_now.kind == "alone"


def test_closing_ends_what_is_under_way():
    fate = Fate(plain_case("pearl", 1, "right"), EAGER, [("well", 0)])
    channel = fate.lifeline(at_once=False)
    channel.close()
    fate.later.pop()()  # it was being made meanwhile
    assert fate.made[0].closed and channel.lost
    assert not isinstance(fate.made[0].sent, Close)
