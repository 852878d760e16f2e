"""Whoever asks a launcher for more than it starts is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pearl.machine import launcher

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = ["python", "/usr/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    "words, asked",
    [
        ([*ACCELERATE, "--num_processes", "4", "eval/gsm8k.py"], "4"),
        ([*ACCELERATE, "--num_processes=6", "eval/gsm8k.py"], "6"),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "8", "x.py"], "8"),
        ([*ACCELERATE, "--num_processes", "2", "x.py"], ""),
        ([*ACCELERATE, "--num_processes", "many", "x.py"], ""),
        ([*ACCELERATE, "x.py"], ""),
        (["bash", "launch", "--num_processes", "4"], ""),
        ([], ""),
    ],
)
def test_one_process_of_many_is_noticed(words, asked):
    said = launcher.note_on(words)
    assert said.startswith(f"accelerate was asked for {asked} processes and started one") if asked else not said


def test_a_process_of_several_has_nothing_to_say(monkeypatch):
    monkeypatch.setattr(launcher, "note_on", lambda words: "one")
    assert launcher.note() == "one"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launcher.note() == ""


@pytest.mark.slow
def test_accelerate_without_gpus_starts_one_of_four_and_that_one_knows(tmp_path):
    script = tmp_path / "who.py"
    script.write_text("from pearl.machine import launcher; launcher.join(9)")
    words = ["--num_processes", "4", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, str(script)],
        env=clean | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "accelerate was asked for 4 processes and started one: this is one pair" in done.stderr
