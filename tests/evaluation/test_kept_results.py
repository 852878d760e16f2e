"""What is committed under docs/results: whole runs, lossless, with the command that made each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted((ROOT / "docs" / "results").glob("*/*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_kept_run_is_lossless_and_says_how_it_was_made(file: Path):
    kept = json.loads(file.read_text())
    assert kept["environment"]["commit"] and kept["environment"]["processor"]
    script, *_ = kept["environment"]["command"]
    assert (ROOT / script).exists()
    assert {figures["identical_to_ar"] for figures in kept["modes"].values()} == {1.0}
    texts = {figures["sequences"] for figures in kept["modes"].values()}
    assert len(texts) == 1, "every mode wrote every text"


def test_the_tasks_were_run_in_full_width():
    def texts(task: str) -> int:
        kept = json.loads((ROOT / "docs/results/smollm2-135m" / f"{task}.json").read_text())
        wanted = {"ar", "ar-all", "sd", "pearl", "pearl-no-pre", "pearl-no-post", "tree"}
        assert set(kept["modes"]) == wanted
        return kept["modes"]["ar"]["sequences"]

    assert (texts("humaneval"), texts("gsm8k")) == (164, 100)
    assert texts("mt_bench") == 160 and texts("spec_bench") == 56  # 48 problems, 8 of them with a second turn


def test_the_batches_wrote_the_same_texts():
    same, told = json.loads((ROOT / "docs/results/bench_batch.json").read_text())["same"]
    assert same == told > 0
