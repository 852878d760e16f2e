"""Figures are totals over totals, of problems, and beside `ar` on the same texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from evaluations import text

from pearl.core import theory
from pearl.core.messages import DraftStats
from pearl.core.records import GenerationStats, GuessOutcome, SampleKey
from pearl.evaluation import metrics


def runs(seconds: dict[str, float], repeats: int = 1) -> dict[SampleKey, GenerationStats]:
    return {SampleKey(name, 0, i): text("sd", (1,), seconds=s) for name, s in seconds.items() for i in range(repeats)}


def summary(**modes: dict[SampleKey, GenerationStats]) -> dict:
    return metrics.summarise(modes, lambda key: key.task[0])


def test_repeats_of_a_problem_are_no_further_problems():
    ar = {"a": 6.0, "b": 6.0, "c": 6.0, "d": 6.0}
    mine = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0}
    once, often = (summary(ar=runs(ar, n), sd=runs(mine, n))["sd"] for n in (1, 5))
    assert often["speedup_vs_ar"] == pytest.approx(once["speedup_vs_ar"])
    assert often["speedup_interval_95"] == pytest.approx(once["speedup_interval_95"])
    low, high = once["speedup_interval_95"]
    assert once["speedup_vs_ar"] == pytest.approx(2.0) and low < 2.0 < high
    assert summary(ar=runs(ar), sd={SampleKey("a"): text("sd", (1,))})["sd"]["speedup_interval_95"] is None


def test_every_category_has_its_own_speed():
    figures = summary(ar=runs({"a1": 6.0, "a2": 6.0, "b1": 6.0}), sd=runs({"a1": 3.0, "a2": 3.0, "b1": 1.0}))["sd"]
    assert {name: one["speedup_vs_ar"] for name, one in figures["by_category"].items()} == {"a": 2.0, "b": 6.0}
    assert figures["by_category"]["a"]["sequences"] == 2


def test_a_turn_after_one_that_differs_tells_nothing_of_the_target():
    ar = {SampleKey("a", turn=t): replace(text("ar", (1,)), tokens=(1, 2, 3)) for t in range(2)}
    mine = {key: replace(one, tokens=(1, 9, 3)) for key, one in ar.items()}
    figures = summary(ar=ar, sd=mine)["sd"]
    assert figures["identical_to_ar"] == 0.0
    assert metrics.divergences(mine, ar) == [(SampleKey("a"), 1)]  # of the first turn alone


def test_equal_devices_are_compared_too():
    modes = {"ar": runs({"a": 6.0}), "ar-all": runs({"a": 4.0}), "sd": runs({"a": 2.0})}
    figures = summary(**modes)
    assert [figures[mode]["speedup_vs_ar_all"] for mode in modes] == pytest.approx([4 / 6, 1.0, 2.0])
    assert summary(ar=modes["ar"])["ar"]["speedup_vs_ar_all"] is None


def test_an_origin_is_told_by_what_was_compared_what_was_picked_and_what_was_read():
    guess = GuessOutcome(1, (0.6, 0.2), ("draft", "recycled"))
    nobody = GuessOutcome(None, (0.9,), ("draft",))
    one = replace(text("tree", (1,)).passes[0], judged=(guess, nobody), committed=2, rows_by={"draft": 3})
    assert one.origins == ("recycled", "")
    assert metrics.by_origin([one, one]) == {
        "draft": {"offered": 4, "accepted": 0, "rows": 6},
        "recycled": {"offered": 2, "accepted": 2, "rows": 0},
    }


def test_a_drafter_is_busy_all_the_time_at_most():
    """Its last forward may end after the text, which in a text of one pass is much."""
    late = replace(text("sd", (1,), seconds=0.01), drafter=DraftStats(sequence_id=0, busy_s=5.0))
    assert summary(sd={SampleKey("a"): late})["sd"]["drafter_busy"] == 1.0


def test_percentiles_count_a_value_as_often_as_its_weight():
    """As counted by hand: the smallest value that reaches the share."""
    assert metrics._percentile([1.0, 2.0, 3.0, 4.0]) == 2.0
    assert metrics._percentile([1.0, 2.0, 3.0], 50, [1, 1, 3]) == 3.0
    assert metrics._percentile([3.0, 1.0], 95, [99, 1]) == 3.0 and metrics._percentile([]) == 0.0


def test_theory_is_asked_for_the_block_length_that_a_run_had():
    figures = {"acceptance": 0.5, "draft_forward_ms": 10.0}
    ar = {SampleKey("a"): replace(text("ar", (1,)), passes=(replace(text("ar", (1,)).passes[0], forward_s=0.04),) * 3)}

    def predicted(mode: str, block: int) -> float | None:
        one = text(mode, (1,))
        blocks = tuple(replace(p, block=block) for p in one.passes)
        return metrics._predicted([replace(one, passes=blocks)], figures, ar)

    assert [predicted("sd", gamma) for gamma in (1, 3)] == [theory.speedup_sd(0.5, 4.0, gamma) for gamma in (1, 3)]
    assert predicted("pearl", 1) == theory.speedup_pearl(0.5, 4.0) and predicted("pearl", 3) is None
