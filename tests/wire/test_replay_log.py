"""A drafter that begins anew is told what the one before it was told, and gives ids that nobody has given."""

from __future__ import annotations

import pytest

from pearl.core.messages import Costs, DraftPlan, DraftStats, End, Guess, Nodes, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.wire.drafter_messages import fault, offset_ids
from pearl.wire.replay_log import ReplayLog


def start(sequence: int) -> Start:
    return Start(sequence, Schedule.of("pearl"), SamplingParams(), (1, 2), DraftPlan())


def test_a_text_under_way_is_told_as_one_that_begins_late():
    log = ReplayLog()
    log.said(start(1))
    log.said(Verdict(1, 2, DraftPlan(), (7,)))
    log.said(Verdict(1, 4, DraftPlan(max_depth=3), (8, 9)))
    assert list(log.again()) == [[start(1), Verdict(1, 4, DraftPlan(max_depth=3), (7, 8, 9))]]
    assert log.roots(1) == (1, 4)


def test_of_a_text_that_has_ended_only_the_report_is_asked_for_and_once_heard_nothing():
    log = ReplayLog()
    log.said(start(1))
    log.said(End(1))
    assert len(log) == 0 and list(log.again()) == [[End(1)]]
    assert log.heard(DraftStats(1)) and not log.heard(DraftStats(1))
    assert list(log.again()) == [] and log.roots(1) is None


@pytest.mark.parametrize("position, wrong", [(0, True), (1, False), (4, False), (5, True)])
def test_a_root_is_where_the_text_has_been(position: int, wrong: bool):
    assert bool(fault(Nodes(1, 0, position, False), 10, roots=(1, 4))) is wrong
    assert not fault(Nodes(1, 0, position, False), 10, roots=None), "of a text that is over nobody knows"


@pytest.mark.parametrize(
    "proposal, wrong",
    [
        ((), False),
        (((3, 1.0),), False),
        (((3, 0.4), (5, 0.5)), False),
        (((5, 0.9),), True),
        (((3, 0.9), (5, 0.9)), True),
    ],
)
def test_a_guess_comes_from_the_distribution_that_it_names(proposal, wrong: bool):
    assert bool(fault(Nodes(1, 0, 1, False, (Guess(1, 0, 3, proposal),)), 10, roots=(1, 4))) is wrong


def test_only_nodes_have_ids_to_offset():
    nodes = Nodes(1, 0, 1, False, (Guess(1, 0, 3),))
    assert offset_ids(nodes, 0) == nodes
    later = offset_ids(nodes, 2)
    assert isinstance(later, Nodes)
    assert later.root == later.guesses[0].parent == 2 << 32 and later.guesses[0].id == (2 << 32) + 1
    assert offset_ids(Costs(1, (0.1,)), 2) == Costs(1, (0.1,))
