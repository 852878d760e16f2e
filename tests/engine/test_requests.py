"""What a request is made of: the engine's own settings, and what it says itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pearl.core.schedule import Schedule
from pearl.engine.requests import RequestBuilder, as_schedule


def builder(schedule: Schedule) -> Any:
    """Of an engine with a drafter, as far as modes are concerned."""
    runtime = SimpleNamespace(
        schedule=schedule,
        model=SimpleNamespace(max_sequences=2),
        config=SimpleNamespace(check_mode=lambda mode: None),
        target=SimpleNamespace(channel=True),
        processes=2,
    )
    return SimpleNamespace(_runtime=runtime)


@pytest.mark.parametrize(
    "own", [Schedule.of("pearl", 4), Schedule.of("sd:3"), Schedule.of("tree", None, 2, 8, 30), Schedule.of("ar")]
)
def test_a_request_that_names_the_engine_s_own_mode_shares_the_passes_of_one_that_names_none(own):
    assert RequestBuilder.run_key(builder(own), own.mode) == RequestBuilder.run_key(builder(own)) == (own, 2)


def test_another_mode_keeps_the_engine_s_limits_and_not_its_block():
    own = Schedule.of("tree", None, 2, 8, 30)
    assert as_schedule("pearl", None, own) == Schedule.of("pearl", None, None, 8, 30)
    assert as_schedule("sd", 3, own) == as_schedule("sd:3", None, own) == Schedule.of("sd", 3, None, 8, 30)
    assert as_schedule("tree:4", None, own) == Schedule.of("tree", None, 4, 8, 30)
    assert as_schedule("ar", None, own) == Schedule.of("ar")
    assert as_schedule("tree", None, Schedule.of("pearl", 4, None, 8)) == Schedule.of("tree", None, None, 8), (
        "one leaf of a chain is no setting of a tree"
    )


def test_a_gamma_of_its_own_changes_the_block_alone():
    assert as_schedule("pearl", 2, Schedule.of("pearl", 4, None, 8, 30)) == Schedule.of("pearl", 2, None, 8, 30)
    assert as_schedule(Schedule.of("sd", 3, None, 8), 5) == Schedule.of("sd", 5, None, 8)
