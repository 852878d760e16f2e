"""What is committed under docs/results: whole runs, lossless, with the command that made each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted(file for file in (ROOT / "docs" / "results").glob("*/*.json") if file.parent.name != "raw")
WHOLE = [file for file in KEPT if file.stem.endswith(("-t0", "-t1"))]  # answers, of which each run has enough


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_kept_run_is_lossless_and_says_how_it_was_made(file: Path):
    kept = json.loads(file.read_text())
    assert kept["environment"]["commit"] and kept["environment"]["processor"]
    script, *_ = kept["environment"]["command"]
    assert (ROOT / script).exists()
    ours = [figures for mode, figures in kept["modes"].items() if not mode.startswith("hf-")]
    assert {figures["identical_to_ar"] for figures in ours} == {1.0}
    texts = {figures["sequences"] for figures in kept["modes"].values()}
    assert len(texts) == 1, "every mode wrote every text"


@pytest.mark.parametrize("task", ["humaneval", "gsm8k", "mt_bench", "spec_bench"])
def test_every_task_has_a_run_of_the_default_pair_in_every_mode(task: str):
    files = [file for file in KEPT if file.parent.name == "smollm2-135m" and file.stem.startswith(task)]
    modes = [set(json.loads(file.read_text())["modes"]) for file in files]
    assert any({"ar", "ar-all", "sd", "pearl", "tree"} <= some for some in modes)


def test_whole_answers_were_decoded_until_their_intervals_were_narrow_or_say_that_they_are_not_finished():
    problems = {"humaneval": 164, "gsm8k": 1319, "mt_bench": 80, "spec_bench": 480}
    for file in WHOLE:
        kept = json.loads(file.read_text())
        assert kept["config"]["max_new_tokens"] >= 512, file
        for mode, figures in kept["modes"].items() if not kept["unfinished"] else ():
            low, high = figures["speedup_interval_95"]
            narrow = high - low <= 0.1 * figures["speedup_vs_ar"]
            assert narrow or kept["problems"] == problems[kept["config"]["suite"]], (file, mode)


def test_the_batches_wrote_the_same_texts():
    same, told = json.loads((ROOT / "docs/results/bench_batch.json").read_text())["same"]
    assert same == told > 0
