"""A mode is four values, and neither side ever waits for what the other one will not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pearl.core.schedule import MAX_AHEAD, MAX_DRAFT_BATCH, MAX_GAMMA, MODES, Schedule
from pearl.core.token_buckets import LIMIT
from pearl.errors import UsageError
from pearl.models.batch_invariance import find_invariant_counts

SWITCHES = {  # pre-verify, post-verify
    "sd": (False, False),
    "pearl": (True, True),
    "pearl-no-pre": (False, True),
    "pearl-no-post": (True, False),
    "tree": (True, True),
}
CHAINS = [mode for mode in SWITCHES if mode != "tree"]
GAMMAS = st.one_of(st.just("auto"), st.integers(1, MAX_GAMMA))
LIMITS = [st.one_of(st.just("auto"), st.integers(1, most)) for most in (MAX_DRAFT_BATCH, LIMIT, 100)]
SCHEDULES = st.builds(Schedule.of, st.sampled_from(list(SWITCHES)), GAMMAS, *LIMITS)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_switches_of_its_row(mode: str):
    schedule = Schedule.of(mode)
    assert (schedule.pre_verify, schedule.post_verify) == SWITCHES.get(mode, (False, False))
    assert schedule.mode == mode and schedule.drafts == (mode in SWITCHES)


@pytest.mark.parametrize("mode", ["ar", "ar-all", *CHAINS])
def test_a_block_without_guesses_is_the_target_alone(mode: str):
    schedule = Schedule.of(mode, 0)
    assert not schedule.drafts and schedule.gamma == 0
    assert schedule.guesses_to_wait_for(hit=True, gamma=0) == schedule.guesses_to_wait_for(hit=False, gamma=0) == 0


@pytest.mark.parametrize("mode", ["ar", "ar-all"])
def test_a_gamma_gives_the_target_alone_no_drafter(mode: str):
    assert Schedule.of(mode, 5) == Schedule.of(mode)


def test_a_tree_has_no_blocks():
    assert Schedule.of("tree", 0) == Schedule.of("tree", 7) == Schedule.of("tree")
    assert Schedule.of("tree").gamma is None and Schedule.of("tree").drafts


def test_the_number_behind_a_mode_is_its_gamma_and_behind_tree_its_branches():
    assert Schedule.of("sd:3") == Schedule.of("sd", 3)
    assert Schedule.of("tree:3") == Schedule.of("tree", draft_batch=3)
    assert Schedule.of("tree:3", gamma=7, draft_batch=5).draft_batch == 3


def test_only_a_tree_has_branches():
    assert [Schedule.of(mode, draft_batch=5).draft_batch for mode in CHAINS] == [1] * len(CHAINS)
    assert Schedule.of("tree").draft_batch is None, "the controller decides"


@pytest.mark.parametrize("mode", SWITCHES)
def test_what_is_not_fixed_by_hand_is_left_to_the_controller(mode: str):
    assert (Schedule.of(mode).max_verify_tokens, Schedule.of(mode).max_draft_tokens) == (None, None)
    fixed = Schedule.of(mode, max_verify_tokens="5", max_draft_tokens=9)
    assert (fixed.max_verify_tokens, fixed.max_draft_tokens) == (5, 9)


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("draft_batch", 0, f"draft_batch must be a whole number from 1 to {MAX_DRAFT_BATCH}"),
        ("draft_batch", MAX_DRAFT_BATCH + 1, "draft_batch must be"),
        ("max_verify_tokens", 0, f"max_verify_tokens must be a whole number from 1 to {LIMIT}"),
        ("max_verify_tokens", LIMIT + 1, "max_verify_tokens must be"),
        ("max_draft_tokens", 0, "max_draft_tokens must be a whole number from 1"),
        ("max_draft_tokens", "far", "max_draft_tokens must be"),
    ],
)
def test_a_limit_out_of_range_is_refused_in_a_sentence(setting: str, value: object, words: str):
    with pytest.raises(UsageError, match=words):
        Schedule.of("tree", **{setting: value})


@pytest.mark.parametrize(
    "gamma, block", [(None, None), ("auto", None), (3, 3), ("3", 3), (3.0, 3), (MAX_GAMMA, MAX_GAMMA)]
)
def test_gamma_is_a_whole_number_or_auto(gamma: object, block: int | None):
    assert Schedule.of("pearl", gamma).gamma == block


@pytest.mark.parametrize("gamma", [-1, MAX_GAMMA + 1, 1.5, "1.5", "many", "", float("nan"), float("inf"), [3], {}])
def test_any_other_gamma_is_refused_in_a_sentence(gamma: object):
    with pytest.raises(UsageError, match="whole number from 0 to 64, or auto"):
        Schedule.of("pearl", gamma)


@pytest.mark.parametrize("mode", ["perl", "SD", "", None, 3, "pearl-no-per"])
def test_an_unknown_mode_is_refused_with_the_modes_there_are(mode: object):
    with pytest.raises(UsageError, match="Choose from ar, ar-all, sd, pearl, pearl-no-pre, pearl-no-post"):
        Schedule.of(mode)


def test_a_misspelt_mode_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"did you mean pearl-no-pre\?"):
        Schedule.of("pearl-no-per")


@given(st.booleans(), st.integers(1, 9))
def test_only_pre_verify_lets_a_pass_follow_a_miss_at_once(hit: bool, block: int):
    for mode in CHAINS:
        wanted = Schedule.of(mode, block).guesses_to_wait_for(hit, block)
        assert wanted == (0 if SWITCHES[mode][0] and not hit else block)


def test_auto_with_post_verify_takes_what_is_there():
    for mode in ("pearl", "tree"):
        assert [Schedule.of(mode).guesses_to_wait_for(hit, 1) for hit in (True, False)] == [0, 0]
    assert [Schedule.of("pearl-no-pre").guesses_to_wait_for(hit, 1) for hit in (True, False)] == [0, 1]


@given(st.integers(1, 9), st.integers(0, 12))
def test_without_post_verify_the_drafter_makes_one_block_and_waits(block: int, drafted: int):
    for mode in ("sd", "pearl-no-post"):
        for gamma in (block, "auto"):
            assert Schedule.of(mode, gamma).room(depth=0, gamma=block, drafted=drafted) == max(0, block - drafted)


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 100), st.one_of(st.none(), st.integers(1, 50)))
def test_post_verify_drafts_the_next_block_and_the_bonus_token_before_it(
    block: int, depth: int, drafted: int, ahead: int | None
):
    for mode in ("pearl", "pearl-no-pre"):
        assert Schedule.of(mode, block).room(depth, block, drafted) == max(0, 2 * block + 1 - depth)
        free = Schedule.of(mode, max_draft_tokens=ahead)
        assert free.room(depth, 1, drafted) == max(0, (ahead or MAX_AHEAD) - depth)


@given(SCHEDULES, st.booleans(), st.integers(1, MAX_GAMMA), st.data())
def test_a_new_chain_has_room_for_all_that_the_target_waits_for(
    schedule: Schedule, hit: bool, block: int, data: st.DataObject
):
    """Otherwise both would wait for each other. (A chain with a history ends by the drafter's word that it rests.)"""
    block = schedule.gamma or (1 if schedule.post_verify else block)
    depth = drafted = 0
    while room := schedule.room(depth, block, drafted):
        step = data.draw(st.integers(1, room))
        depth, drafted = depth + step, drafted + step
    assert depth >= schedule.guesses_to_wait_for(hit, block)


@given(SCHEDULES)
def test_a_schedule_can_be_made_again_from_its_mode_and_its_numbers(schedule: Schedule):
    """Which is how it crosses the wire."""
    numbers = (schedule.gamma, schedule.draft_batch, schedule.max_verify_tokens, schedule.max_draft_tokens)
    assert Schedule.of(schedule.mode, *numbers) == schedule


def test_a_pass_may_be_as_wide_as_the_widest_that_is_measured_and_no_wider():
    """One limit: of the setting, and of what loading measures (`find_invariant_counts`)."""
    asked = []

    def read(tokens, first):
        asked.append(len(tokens))
        return torch.zeros(len(tokens), 3)

    widest = find_invariant_counts(read, 3).most
    assert widest == max(n for n in asked if n <= LIMIT)
    assert Schedule.of("tree", max_verify_tokens=widest).max_verify_tokens == widest
    with pytest.raises(UsageError, match=f"from 1 to {widest}"):
        Schedule.of("tree", max_verify_tokens=widest + 1)
