"""A run that was begun under the old names goes on under those of today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pearl.config import cli
from pearl.config.earlier import of_today
from pearl.evaluation import results
from pearl.evaluation.eval_config import TASK

ROOT = Path(__file__).resolve().parents[2]
RESOLVED = {"target": "t", "draft_beam": 0, "static": "auto", "eager": False, "draft_vocabulary": 9, "silence_s": 10.0}
BEGUN = {"gamma": "4", "width": "auto", "branches": "2", "max_ahead": "auto", "target_tp": 1, "draft_restarts": 3}
BEGUN |= {"draft_deadline_s": 0.25, "feature_lane": "auto", "eager": True, "static": "auto", "resolved": RESOLVED}


def test_old_names_and_values_become_those_of_today():
    assert of_today(BEGUN) == {
        "gamma": 4,
        "max_verify_tokens": "auto",
        "draft_batch": 2,
        "max_draft_tokens": "auto",
        "tensor_parallel_size": 1,
        "max_draft_restarts": 3,
        "draft_timeout_s": 0.25,
        "feature_transport": "auto",
        "cuda_graphs": "static-only",
        "resolved": {
            "target": "t",
            "tree_top_k": 0,
            "cuda_graphs": "auto",
            "draft_vocabulary": 9,
            "heartbeat_timeout_s": 10.0,
        },
    }
    assert of_today(of_today(BEGUN)) == of_today(BEGUN)


def test_a_run_of_before_is_gone_on_with(tmp_path):
    (tmp_path / results.CONFIG).write_text(json.dumps(BEGUN))
    results.check(tmp_path, {"gamma": 4, "draft_batch": 2, "resolved": of_today(BEGUN)["resolved"]})


KEPT = sorted(file for file in (ROOT / "docs" / "results").glob("*/*.json") if file.parent.name != "raw")


@pytest.mark.parametrize("file", KEPT, ids=lambda f: f.stem)
def test_every_name_in_kept_results_is_one_of_today(file: Path):
    known = {one.dest for one in (*cli.SHARED, *TASK)} | {"config", "suite", "problems"}
    known |= {"prompts", "prompt_format", "resolved"}
    assert of_today(json.loads(file.read_text())["config"]).keys() <= known
