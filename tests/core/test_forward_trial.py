"""A forward of a source beside the target is made where it brings more than it takes, and else hardly ever."""

from __future__ import annotations

import pytest

from pearl.core.control.forward_trial import TRIED, ForwardQuery, ForwardTrial

PASS_S, RATE = 0.05, 20.0  # a token a pass


def run(trial: ForwardTrial, passes: int, forward_s: float, brings: float, reach: float = 0.0, unread: int = 0) -> int:
    """How many forwards are made in so many passes of one text, each of which brings so many tokens."""
    made = 0
    for _ in range(passes):
        query = ForwardQuery("text", reach, unread)
        if trial.choose([query], RATE):
            trial.made([query], forward_s)
            trial.brought(query.place, brings)
            made += 1
        trial.passed(PASS_S)
    return made


@pytest.mark.parametrize("brings, forward_s", [(1.0, 0.01), (0.5, 0.02), (1.5, 0.06)])
def test_what_pays_is_made_before_every_pass(brings: float, forward_s: float):
    assert run(ForwardTrial((forward_s,)), 200, forward_s, brings) == 200


@pytest.mark.parametrize("forward_s", [0.002, 0.01, 0.05, 0.5])
def test_what_brings_nothing_takes_little_of_the_time(forward_s: float):
    trial, passes = ForwardTrial((forward_s,)), 2000
    spent = forward_s * run(trial, passes, forward_s, 0.0)
    assert spent < (TRIED + 0.005) * passes * PASS_S + 2 * forward_s
    assert run(trial, passes, forward_s, 0.0) * forward_s <= 2 * TRIED * passes * PASS_S, "and less once it is known"


def test_what_has_become_worth_it_is_found_out():
    trial = ForwardTrial((0.01,))
    run(trial, 2000, 0.01, 0.0)
    assert run(trial, 2000, 0.01, 1.5) > 1000


def test_where_others_reach_far_and_it_brings_nothing_it_is_left_out_there_alone():
    trial = ForwardTrial((0.01,))
    for _ in range(30):
        run(trial, 1, 0.01, 1.0, reach=0.0)
        run(trial, 1, 0.01, 0.0, reach=3.0)
    assert run(trial, 50, 0.01, 1.0, reach=0.0) == 50
    assert run(trial, 50, 0.01, 0.0, reach=3.0) < 12


def test_a_long_prompt_is_read_once_what_was_missed_is_worth_reading_it():
    trial, short, long = ForwardTrial((0.005,)), ForwardQuery("a", 0.0), ForwardQuery("b", 0.0, unread=400)
    for _ in range(20):
        trial.made([short], 0.005)
        trial.brought(short.place, 1.0)
    trial.made([long], 0.405)  # a millisecond a row
    trial.brought(short.place, 1.0)
    waited = 0
    while not trial.choose([long], RATE):
        waited += 1
    # a forward brings about 50 ms and takes 5
    assert 6 <= waited <= 12
    trial.ended("b")
    assert not trial.choose([long], RATE), "the next text saves for itself"


def test_of_several_texts_those_share_a_forward_that_bring_more_than_they_add_to_it():
    trial = ForwardTrial((0.01, 0.02, 0.03, 0.04))
    for reach, brings in ((0.0, 1.0), (3.0, 0.0)):
        for _ in range(30):
            query = ForwardQuery("text", reach)
            trial.made([query], 0.01)
            trial.brought(query.place, brings)
    some = [ForwardQuery(number, reach) for number, reach in enumerate((3.0, 0.0, 0.0, 3.0))]
    assert sorted(trial.choose(some, RATE)) == [1, 2]


def test_what_forwards_lose_where_little_was_expected_is_no_debt_elsewhere():
    trial, far, near = ForwardTrial((0.01,)), ForwardQuery("text", 6.0), ForwardQuery("text", 0.0)
    for _ in range(300):
        trial.made([far], 0.01)
        trial.brought(far.place, -0.2)
    assert 0.0 <= trial.worth(near) < 1.5
    for _ in range(60):
        trial.made([far], 0.01)
        trial.brought(far.place, 0.5)
    assert trial.worth(near) < 10.0


@pytest.mark.parametrize("brings, times", [(0.0, 30), (0.8, 200)])
def test_a_second_forward_before_a_pass_is_judged_apart(brings: float, times: int):
    """What it does not bring is no fault of the first, and it is made as long as it brings something itself."""
    trial, first, second = ForwardTrial((0.01,)), ForwardQuery("text", 0.0), ForwardQuery("text", 0.7, again=True)
    made = 0
    for _ in range(200):
        assert trial.choose([first], RATE)
        trial.made([first], 0.01)
        trial.brought(first.place, 1.5)
        if trial.choose([second], RATE):
            made += 1
            trial.made([second], 0.01)
            trial.brought(second.place, brings)
        trial.passed(PASS_S)
    assert made <= times and (made == times) == (brings > 0.0)
