"""What is expected of a mode agrees with theory where theory speaks, and follows from what was recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import tiered

from pearl.commands.predict import main
from pearl.core import theory
from pearl.core.schedule import Schedule
from pearl.errors import UsageError
from pearl.predict.prediction import by_hand, predict
from pearl.predict.replay import BEYOND, Case, _of_drafter, missed, read_run, sureness
from pearl.predict.script import VOCABULARY, DraftedToken, Script, token
from pearl.predict.simulation import simulate


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--a", "0.8", "--c", "3", "--mode", "tree"], "--mode is for a recorded run, not for numbers by hand"),
        (["results/x", "--beside", "0.5"], "--beside is for numbers by hand, not for a run: leave it out"),
        (["results/x", "--row-cost", "0"], "--row-cost is for numbers by hand, not for a run: leave it out"),
        (["--a", "0.8", "--c", "3", "--beside-cost", "0.1"], "give its acceptance by --beside"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words, sentence, capsys):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


EVERY = ("ar", "sd", "sd:3", "pearl", "pearl:4", "pearl-no-pre", "pearl-no-post", "tree", "tree:4")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def speedup(case: Case, mode: str) -> float:
    return predict(case, [mode])[mode]["speedup_vs_ar"]


def rate(case: Case, mode: str) -> float:
    """Tokens in the time of a pass: by hand, the speed-up."""
    (text,) = simulate(Schedule.of(mode), [the(case)], case.times)
    return len(text.tokens) / text.seconds


def the(case: Case) -> Script:
    (script,) = case.scripts.values()
    return script


def acceptance(case: Case) -> float:
    """The share of first guesses that are right in this very text."""
    places = the(case).places
    return sum(place is not None and place.rank == 0 for place in places) / len(places)


# theory


@pytest.mark.slow
@pytest.mark.parametrize(("a", "c", "gamma"), [(0.6, 2.6, 2), (0.8, 5.0, 4), (0.92, 3.0, 3)])
def test_blocks_in_lock_step_gain_what_leviathan_says(a: float, c: float, gamma: int):
    case = by_hand(a, c, tokens=6000)
    assert rate(case, f"sd:{gamma}") == pytest.approx(theory.speedup_sd(acceptance(case), c, gamma), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("a", "c"), [(0.6, 2.6), (0.8, 3.0), (0.92, 3.0)])
def test_pearl_gains_what_theory_says(a: float, c: float):
    case = by_hand(a, c, tokens=5000)
    assert rate(case, "pearl") == pytest.approx(theory.speedup_pearl(acceptance(case), c), rel=0.02)


def test_a_drafter_without_end_of_speed_makes_every_pass_full():
    figures = predict(by_hand(1.0, 1e9, tokens=400), ["sd:4", "pearl"])
    assert figures["sd:4"]["speedup_vs_ar"] == pytest.approx(
        5, rel=0.06
    )  # four guesses and the bonus, cut at a multiple of slots
    assert figures["pearl"]["speedup_vs_ar"] == pytest.approx(16, rel=0.06)  # the most rows of a pass


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_drafter_that_never_comes_costs_nothing(mode: str):
    figures = predict(by_hand(0.9, 1e-6, tokens=200), [mode])[mode]
    assert figures["speedup_vs_ar"] == pytest.approx(1, rel=0.03)
    assert figures["tokens_per_pass"] == 1


def test_lock_step_waits_for_a_slow_drafter():
    assert speedup(by_hand(0.9, 0.01, tokens=30), "sd:2") < 0.03


@pytest.mark.parametrize("mode", tiered(["sd:2", "pearl", "tree"], lambda mode: mode != "tree"))
def test_a_slower_wire_is_never_faster(mode: str):
    gains = [speedup(by_hand(0.8, 5.0, latency, tokens=400), mode) for latency in (0.0, 0.5, 4.0)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.2 * gains[-1]


def test_a_round_of_lock_step_pays_the_wire_twice():
    slow, fast = (speedup(by_hand(0.8, 4.0, latency, tokens=1000), "sd:2") for latency in (0.25, 0.0))
    assert fast / slow == pytest.approx((1 + 2 / 4 + 2 * 0.25) / (1 + 2 / 4), rel=0.02)


@pytest.mark.parametrize("a", [0.4, 0.7])
def test_a_tree_gains_on_a_chain_where_the_drafter_is_unsure_and_rows_are_free(a: float):
    figures = predict(by_hand(a, 4.0, tokens=400), ["pearl", "tree"])
    assert figures["tree"]["speedup_vs_ar"] > 1.1 * figures["pearl"]["speedup_vs_ar"]


def test_rows_that_cost_take_from_the_gain():
    free, dear = (by_hand(0.8, 4.0, tokens=600, row_cost=cost) for cost in (0.0, 0.3))
    assert speedup(dear, "tree") < 0.9 * speedup(free, "tree")


# the simulation


@pytest.mark.parametrize("mode", EVERY)
def test_the_simulated_text_is_the_scripted_one(mode: str):
    case = by_hand(0.7, 3.3, latency=0.05, tokens=150, row_cost=0.02)
    script = replace(the(case), prompt=100)
    for text in simulate(Schedule.of(mode), [script, script], case.times, own=0.5):
        assert list(text.tokens) == [position % VOCABULARY for position in range(100, 250)]
        assert sum(one.committed for one in text.passes) == 150


def test_the_same_case_is_predicted_the_same():
    once, again = (predict(by_hand(0.7, 3.0, tokens=150), EVERY) for _ in range(2))
    assert once == again


def test_sides_that_crowd_each_other_lose_only_where_they_work_at_once():
    case = by_hand(0.8, 3.0, tokens=300)
    crowded = replace(case, times=replace(case.times, crowding=1.5))
    assert speedup(crowded, "pearl") < speedup(case, "pearl") / 1.25
    assert speedup(crowded, "sd:2") == pytest.approx(speedup(case, "sd:2"), rel=0.02)


def test_own_guesses_that_come_true_help_a_tree():
    case = by_hand(0.9, 1.5, tokens=400)
    assert speedup(replace(case, own=0.9), "tree") > 1.1 * speedup(case, "tree")


@pytest.mark.parametrize("rank", [0, 1, 3, BEYOND, VOCABULARY - 1])
def test_a_place_ranks_the_targets_token_where_it_says(rank: int):
    place = DraftedToken(rank, (0.5, 0.25, 0.1))
    logits = Script(7, (place,), 0.0, 0.0).drafted[0]
    assert sorted(place.choice(guess) for guess in range(VOCABULARY)) == list(range(VOCABULARY))
    assert int(logits.argsort(descending=True)[rank]) == token(7)
    assert logits.softmax(-1).topk(3).values.tolist() == pytest.approx([0.5, 0.25, 0.1], abs=1e-3)


def test_a_drafter_is_as_often_right_as_it_is_sure():
    rng = random.Random(0)
    drawn = [(sureness(right, 0.8, rng), right) for right in (rng.random() < 0.8 for _ in range(20_000))]
    for low in (0.2, 0.4, 0.6, 0.8):
        bucket = [(q, right) for q, right in drawn if low <= q < low + 0.2]
        share = sum(right for _, right in bucket) / len(bucket)
        assert share == pytest.approx(sum(q for q, _ in bucket) / len(bucket), abs=0.04)


def test_a_miss_is_ranked_after_the_guesses_that_were_offered():
    rng = random.Random(0)
    assert {missed(3, rng) for _ in range(2000)} == {3, 4, 5, 6, 7, BEYOND}
    assert sum(missed(1, rng) == 1 for _ in range(10_000)) == pytest.approx(5800, rel=0.05)


# recorded runs

TOKENS = 20  # 1 from the prompt, 4 from what is left of the first block, then 5 three times


def a_pass(mode: str, position: int, committed: int, offered: int, forward_s: float, waited_s: float, rank=0) -> dict:
    judged = [{"rank": rank, "q": [1.0]}] * (offered if offered else 0)
    facts = {"task_id": "t/0", "mode": mode, "sample": 0, "position": position, "committed": committed}
    times = {"forward_s": forward_s, "waited_s": waited_s, "seconds": forward_s + waited_s}
    return {**facts, "offered": offered, "judged": judged, **times}


def record(folder: Path, change: Callable[[list[dict[str, Any]], dict[str, Any]], None] = lambda *_: None) -> Path:
    """A run of a prompt of 10 tokens, read in 2 s; a pass takes 1 s whatever its rows, a drafter forward 0.25 s."""
    passes = [a_pass("ar", 9 + i, 1, 0, 1.0 if i else 2.0, 0.0) for i in range(TOKENS)]
    passes.append(a_pass("sd:4", 9, 1, 0, 2.0, 0.0) | {"judged": [{"rank": 0, "q": [1.0]}]})
    passes.append(a_pass("sd:4", 10, 4, 3, 1.0, 0.0))
    passes += [a_pass("sd:4", at, 5, 4, 1.0, 1.0) for at in (14, 19, 24)]
    drafted = {"draft_forwards": 16, "draft_rows": 16, "draft_busy_s": 4.25}
    drafted |= {"drafter_busy": 4.25 / 9, "target_busy": 6 / 9, "target_waiting": 3 / 9}
    summary = {
        "config": {"gamma": "auto"},
        "environment": {"rows": {"safe": list(range(1, 17)), "cost_s": [1.0] * 16, "exact": True}, "draft_costs": []},
        "modes": {
            "ar": {"speedup_vs_ar": 1.0, "seconds": 21.0},
            "sd:4": {"speedup_vs_ar": 21 / 9, "seconds": 9.0, **drafted},
        },
    }
    change(passes, summary)
    folder.mkdir(exist_ok=True)
    (folder / "passes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in passes))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_recorded_run_is_predicted_to_the_second(tmp_path: Path):
    case = read_run(record(tmp_path), latency_s=0.0)
    figures = predict(case, ["sd:4"])
    assert figures["ar"]["seconds"] == pytest.approx(2 + 19)
    assert figures["sd:4"]["seconds"] == pytest.approx(2 + 1 + 3 * (4 * 0.25 + 1))
    assert figures["sd:4"]["tokens_per_pass"] == TOKENS / 5
    assert figures["sd:4"]["speedup_vs_ar"] == pytest.approx(case.measured["sd:4"])
    assert figures["sd:4"]["decode_speedup_vs_ar"] == pytest.approx(19 / 7)


def test_other_verdicts_make_another_prediction(tmp_path: Path):
    def second_is_wrong(passes, summary):
        for one in passes:
            one["judged"] = [{"rank": None if at == 1 else 0, "q": [1.0]} for at in range(len(one["judged"]))]

    right, wrong = record(tmp_path / "right"), record(tmp_path / "wrong", second_is_wrong)
    assert speedup(read_run(wrong), "sd:4") < 0.8 * speedup(read_run(right), "sd:4")


def test_what_a_synthetic_run_predicts_says_that_it_is_one(tmp_path: Path):
    told = record(tmp_path, lambda _, summary: summary["config"].update(resolved={"draft": "synthetic:0.8"}))
    assert read_run(told).source.startswith(f"{tmp_path} (synthetic), the guesses of mode sd:4")


def test_a_slower_drafter_of_the_run_is_slower_in_every_mode(tmp_path: Path):
    def slow(passes, summary):
        summary["modes"]["sd:4"]["draft_forwards"] = 7

    for mode in ("sd:2", "pearl:2"):
        fast = speedup(read_run(record(tmp_path / "fast")), mode)
        assert speedup(read_run(record(tmp_path / "slow", slow)), mode) < fast


def test_a_search_in_the_text_is_replayed_without_forwards(tmp_path: Path):
    def without_model(passes, summary):
        summary["modes"]["sd:4"] |= {"draft_forwards": 0, "drafter_busy": 0.0}

    case = read_run(record(tmp_path, without_model), latency_s=0.0)
    figures = predict(case, ["sd:4", "pearl"])
    assert not case.times.draft_s and "no model" in case.notes[0]
    assert figures["sd:4"]["seconds"] == pytest.approx(2 + 4)  # the guesses cost nothing
    assert figures["pearl"]["tokens_per_pass"] == 4  # no place was judged after the last of a block: it ends there


def test_what_sources_beside_the_target_guessed_is_not_taken_for_the_drafters():
    both = {"rank": 0, "q": [0.3, 0.6, 0.2], "origins": ["recycled", "draft", "draft"]}
    assert _of_drafter(both) == (None, (0.6, 0.2))
    assert _of_drafter(both | {"rank": 2}) == (1, (0.6, 0.2))
    assert _of_drafter({"rank": 0, "q": [0.3], "origins": ["recycled"]}) == (None, ())
    assert _of_drafter({"rank": 1, "q": [0.3, 0.2]}) == (1, (0.3, 0.2)), "of an early run"


def test_places_that_were_not_judged_are_drawn_from_those_that_were(tmp_path: Path):
    def forget(passes, summary):
        for one in passes[-2:]:
            one["judged"] = []

    assert speedup(read_run(record(tmp_path, forget), latency_s=0.0), "sd:4") == pytest.approx(21 / 9)


def test_crowding_is_told_by_passes_beside_a_working_drafter(tmp_path: Path):
    def crowd(passes, summary):
        for at in range(10):
            passes.append(a_pass("pearl", 9 + 2 * at, 2, 0, 1.3 if at else 2.0, 0.0))
        summary["modes"]["pearl"] = {"drafter_busy": 1.0, "target_busy": 1.0, "target_waiting": 0.0}

    times = read_run(record(tmp_path, crowd)).times
    assert times.crowding == pytest.approx(1.3)
    assert times.prompt_crowding == 1
    assert times.pass_s[0] == pytest.approx(1, rel=0.01)


# the command


def test_the_command_sets_the_measured_beside_the_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "figures.json"
    assert main([str(record(tmp_path / "run")), "--latency", "0", "--modes", "sd:4", "pearl", "--json", str(out)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "sd:4" in line and "│" in line)
    assert line.count("2.33") == 2 and "1.00" in line
    written = json.loads(out.read_text())
    assert set(written["modes"]) == {"ar", "sd:4", "pearl"}
    assert written["measured"]["sd:4"] == pytest.approx(21 / 9)


def test_the_command_answers_by_hand(capsys: pytest.CaptureFixture[str]):
    assert main(["--a", "0.8", "--c", "3", "--tokens", "50", "--modes", "pearl"]) == 0
    said = capsys.readouterr().out
    assert "pearl" in said and "a 0.8, c 3" in said


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def of_an_earlier_version(folder: Path) -> None:
    record(folder, lambda passes, summary: [one.pop("judged") for one in passes] and None)


def of_ar_alone(folder: Path) -> None:
    record(folder, lambda passes, summary: [one.update(judged=[]) for one in passes] and None)


def of_texts_side_by_side(folder: Path) -> None:
    record(folder, lambda passes, summary: summary["config"].update(batch_size=4))


def without_rows(folder: Path) -> None:
    record(folder, lambda passes, summary: summary["environment"].pop("rows"))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without("passes.jsonl"), "holds no passes.jsonl"),
        (without("summary.json"), "can't be read"),
        (lambda folder: (folder / "passes.jsonl").write_text(""), "is empty"),
        (lambda folder: (folder / "passes.jsonl").write_text("{"), "is not JSON"),
        (of_an_earlier_version, "record the run again"),
        (of_ar_alone, "no guess"),
        (of_texts_side_by_side, "record one with --batch-size 1"),
        (without_rows, "does not say what rows cost"),
    ],
)
def test_a_run_that_says_too_little_is_refused(tmp_path: Path, break_it: Callable[[Path], None], said: str):
    folder = record(tmp_path / "run")
    break_it(folder)
    with pytest.raises(UsageError, match=said):
        read_run(folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--a", "0.8", "--c", "4", "--beside", "0.5", "--beside-cost", "nan"], "a cost that is not negative"),
        ([], "folder of a run"),
        (["here", "--a", "0.5", "--c", "2"], "folder of a run"),
        (["nowhere"], "nowhere holds no finished run"),
        (["--a", "0.5"], "both --a and --c"),
        (["--a", "1.5", "--c", "2"], "from 0 to 1"),
        (["--a", "0.5", "--c", "0"], "c > 0"),
        (["--a", "0.5", "--c", "2", "--tokens", "0"], "at least one token"),
        (["--a", "0.5", "--c", "2", "--modes", "perl"], "did you mean pearl"),
        (["--a", "0.5", "--c", "2", "--modes", "ar-all"], "leave it out"),
        (["--a", "much", "--c", "2"], "invalid float"),
    ],
)
def test_what_can_t_be_predicted_is_refused_in_a_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_mode_that_the_run_does_not_hold_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no mode 'tree': choose from ar, sd:4"):
        read_run(record(tmp_path), "tree")


@pytest.mark.slow
def test_a_source_beside_the_target_fills_what_the_drafter_leaves():
    """A slow drafter leaves passes that read the root alone; what a forward costs decides whether it is worth them."""
    alone, cheap, dear, wrong = (
        predict(by_hand(0.8, 1.3, tokens=600, beside=beside), ["tree"])["tree"]
        for beside in (None, (0.7, 0.1, 5), (0.7, 3.0, 5), (0.0, 0.1, 5))
    )
    speed = "decode_speedup_vs_ar"
    assert cheap[speed] > 1.15 * alone[speed] and cheap["by_origin"]["feature"]["accepted"] > 50
    assert dear[speed] > 0.97 * alone[speed] and wrong[speed] > 0.97 * alone[speed]


def test_one_that_answers_at_once_needs_no_drafter_forward():
    figures = predict(by_hand(0.0, 5.0, tokens=300, beside=(1.0, 0.0, 4)), ["pearl", "sd:2"])
    assert figures["pearl"]["tokens_per_pass"] > 3
    assert figures["sd:2"]["tokens_per_pass"] == pytest.approx(1, abs=0.02), "there is none in serial decoding"


def test_of_a_run_each_source_beside_the_target_has_its_own_guesses(tmp_path: Path):
    def with_others(passes, summary):
        summary["config"] |= {"draft": "a model", "target_draft": None}  # which is what a run has if nothing was asked
        summary["environment"]["beside"] = [
            {"origin": "suffix", "seconds": [], "depths": 1},
            {"origin": "recycled", "seconds": [], "depths": 1},
            {"origin": "feature", "seconds": [0.1, 0.2], "depths": 5},
        ]
        for one in passes:
            one["judged"] = [
                judged | {"origins": ["draft", "suffix", "feature", "recycled"], "q": [1.0, 0.75, 0.5, 0.25]}
                for judged in one["judged"]
            ]

    plain, case = read_run(record(tmp_path / "plain")), read_run(record(tmp_path / "run", with_others))
    assert {one.origin: (one.forward_s, one.depths) for one in case.beside} == {
        "suffix": (0.0, 8),
        "recycled": (0.0, 8),
        "feature": (0.1, 5),
    }
    for before, script in zip(plain.scripts.values(), case.scripts.values(), strict=True):
        assert script.places == before.places
        heads = script.beside[[one.origin for one in case.beside].index("feature")]
        assert all(place and place.q == (0.5,) and place.rank == 1 for place in heads)
    assert predict(case, ["pearl"])["pearl"]["speedup_vs_ar"] > 0


@pytest.mark.parametrize("origin", ["feature", "suffix"])
def test_of_two_sources_of_one_kind_on_both_sides_each_has_the_guesses_of_that_kind(tmp_path: Path, origin: str):
    def one_kind(passes, summary):
        summary["environment"]["beside"] = [
            {"origin": "recycled", "seconds": [], "depths": 1},
            {"origin": origin, "seconds": [0.1] * (origin == "feature"), "depths": 5},
        ]
        if origin == "suffix":
            summary["modes"]["sd:4"] |= {"draft_forwards": 0, "drafter_busy": 0.0}
        for one in passes:
            one["judged"] = [judged | {"origins": [origin, "recycled"], "q": [1.0, 0.5]} for judged in one["judged"]]

    case = read_run(record(tmp_path / "run", one_kind), latency_s=0.0)
    for script in case.scripts.values():
        for said in (script.places, script.beside[1]):
            assert {(place.rank, len(place.q)) for place in said if place} == {(0, 1)}
    assert predict(case, ["pearl"])["pearl"]["speedup_vs_ar"] > 1.2


def test_a_run_whose_drafter_came_too_late_for_every_guess_is_refused(tmp_path: Path):
    def recycled(passes, summary):
        summary["environment"]["beside"] = [{"origin": "recycled", "seconds": [], "depths": 1}]
        for one in passes:
            one["judged"] = [judged | {"origins": ["recycled"]} for judged in one["judged"]]

    with pytest.raises(UsageError, match="no guess of the drafter was judged in mode sd:4"):
        read_run(record(tmp_path, recycled))
