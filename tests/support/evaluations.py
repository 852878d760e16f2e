"""Evaluations of the tiny pair: data sets of two problems, the scripts in this process, and what they have left."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from pearl.core.messages import DraftStats
from pearl.core.records import GenerationStats, GuessOutcome, Pass
from pearl.evaluation import results

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("--processes", "1", "--target-cores", str(min(os.sched_getaffinity(0))))
# In the formats of the data sets, written for these tests
SAMPLES = {
    "gsm8k": [
        {"question": "A hen lays 3 eggs a day. How many in a week?", "answer": "3*7=<<3*7=21>>21 eggs.\n#### 21"},
        {"question": "A house costs $80,000 and a garden twice that.", "answer": "2*80,000=160,000.\n#### 160,000"},
    ],
    "mgsm": [
        {"question_id": 7, "question": "Wie viele Eier?", "category": "german", "answer": "70000"},
        {"question_id": 8, "question": "কয়টি ডিম?", "category": "bengali", "answer": "18"},
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now in capitals."]},
        {"question_id": 101, "category": "math", "turns": ["1 + 1?", "And twice that?"], "reference": ["2", "4"]},
    ],
    "speed_bench": [
        {
            "question_id": "a" * 32,
            "category": "writing",
            "sub_category": "letters",
            "turns": ["Write a line.", "Now in capitals."],
            "source": "own",
            "src_id": "1",
            "difficulty": "",
            "multiturn": True,
        },
        {
            "question_id": "b" * 32,
            "category": "low_entropy",
            "sub_category": "coding",
            "turns": ["def f(x):"],
            "source": "own",
            "src_id": "2",
            "difficulty": "easy",
            "multiturn": False,
        },
    ],
    "spec_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now in capitals."]},
        {"question_id": 241, "category": "qa", "turns": ["Who played Anna?"]},
    ],
}


def written(tmp_path, name: str, records: list[dict] | None = None) -> str:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records or SAMPLES[name]))
    return str(file)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"eval_{name}", ROOT / "eval" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(pair, data: str, output: Path, *more: str, mode: str = "ar,sd:3") -> list[str]:
    """For the tiny pair."""
    small = "--dtype float32 --max-length 500 --max-new-tokens 12"
    files = ["--target", pair[0], "--draft", pair[1], "--data", data, "--output", str(output)]
    return [*small.split(), *files, "--mode", mode, *more]


def run(name: str, *arguments: str) -> int:
    """In this process, on one core."""
    return script(name).main([*ALONE, *arguments])


def summary(folder: Path) -> dict:
    return json.loads((folder / results.SUMMARY).read_text())


def said(folder: Path) -> list[tuple]:
    """The texts of a run, in the order of the file."""
    lines = (folder / results.SAMPLES).read_text().splitlines()
    return [(x["task_id"], x["sample"], x["repeat"], x["turn"], x["mode"], x["tokens"]) for x in map(json.loads, lines)]


OUTCOMES = (GuessOutcome(0, (0.25, 0.125), ("draft", "suffix")), GuessOutcome(None, ()))
ONE = Pass(3, 2, 1, 0, 0, 1, 1, 2, True, OUTCOMES, 1, 1, 1, 0.0, 0.5, 1.0, 2.0, verified=1, accepted_rows=1)


def text(mode: str, prompt: Sequence[int], seed: int = 0, seconds: float = 2.0) -> GenerationStats:
    """What the toy decoder of `mode` writes: the same words in every mode, in other passes."""
    words = random.Random(f"{list(prompt)} {seed}").choices(range(9), k=4)
    passes = tuple(replace(ONE, committed=n, seconds=seconds) for n in ((1, 1, 1, 1) if mode == "ar" else (1, 3)))
    report = None if mode == "ar" else DraftStats(sequence_id=0, hits=2, verdicts=3, busy_s=0.1)
    return GenerationStats(
        mode, len(prompt), tuple(words), "".join(map(str, words)), "length", passes, report, 64, 10**6
    )
