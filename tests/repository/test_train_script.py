"""Texts for training have nothing of the evaluations, and the script that trains says what it can't do, and when."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from trained import random_answer, save_recorded
from transformers import LlamaConfig

from pearl.training import shards
from pearl.training.shards import Manifest, Recorded

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import overlap

ROOT = Path(__file__).resolve().parents[2]
RUN = "one two three four five six seven eight nine ten eleven twelve thirteen"


# What is in common with the evaluations


@pytest.fixture
def evaluation(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(overlap, "humaneval", lambda: iter(()))
    (tmp_path / "test.jsonl").write_text(json.dumps({"turns": [f"Say: {RUN.upper()}, please"]}) + "\n")
    return tmp_path / "test.jsonl"


def test_a_question_with_thirteen_words_in_common_is_left_out(evaluation, tmp_path, capsys):
    lines = [json.dumps({"prompt": text}) for text in (f"So {RUN}!", RUN.removesuffix(" thirteen"), "two\u2028three")]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    words = [str(tmp_path / "q.jsonl"), "--against", str(evaluation)]
    assert overlap.main(words) == 1 and "3 texts" in capsys.readouterr().out
    assert overlap.main([*words, "--drop"]) == 0 and overlap.main(words) == 0
    assert (tmp_path / "q.jsonl").read_text().split("\n") == [*lines[1:], ""]


@pytest.mark.usefixtures("own_cache")
def test_so_is_a_recorded_text_whoever_wrote_its_question(evaluation, tmp_path, capsys):
    target = tiny.random_model(LlamaConfig(**tiny.SIZES | {"vocab_size": 280, "num_hidden_layers": 4}))
    target.save_pretrained(tmp_path / "target")
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path / "target")
    data = save_recorded(tmp_path / "data", target)
    answers = [random_answer(20 + seed, 4, 128, seed) for seed in range(3)]
    long = random_answer(len(words.encode(RUN)), 4, 128, 9)
    long.tokens = words.encode(RUN)
    manifest = Manifest.read(data)
    assert manifest
    manifest.target = str(tmp_path / "target")
    manifest.shards[1] = shards.write(data, 1, [answers[0], long, answers[2]])
    manifest.write(data)
    given = [str(data), "--against", str(evaluation)]
    assert overlap.main(given) == 1 and "shard-00001.safetensors: one two" in capsys.readouterr().out
    assert overlap.main([*given, "--drop"]) == 0 and overlap.main(given) == 0
    left = Recorded(data)  # sizes and checksums are those of the manifest
    assert [left[number].tokens.tolist() for number in (4, 5)] == [answers[0].tokens, answers[2].tokens]
    assert left[5].prompt == 4 and left[5].features.equal(answers[2].features) and len(left) == 4 + 2 + 4
    assert left.manifest.shards[1].responses == 16 + 18


def test_scripts_without_spaces_are_compared_by_the_character():
    chinese, thai = "罗杰有五个网球他又买了两罐网球", "โรเจอร์มีลูกเทนนิสห้าลูก"
    for text in (chinese, thai):
        assert overlap.runs(text, 13) & overlap.runs(f"abc {text}!", 13)
    assert overlap.runs("a1b 罗杰", 3) == {("a1b", "罗", "杰")} and not overlap.runs("one two three", 13)


def test_what_is_not_there_is_said_in_a_sentence(evaluation, tmp_path, capsys):
    assert overlap.main([str(evaluation), "--against", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert overlap.main([str(tmp_path)]) == 2 and "holds no recorded texts" in capsys.readouterr().err
    assert overlap.main([str(evaluation), "--against"]) == 0, "there may be nothing to compare with"


# The script


@pytest.fixture
def tools(tmp_path) -> dict[str, str]:
    """An environment in which all is installed, whose commands only say what they were asked."""
    place = tmp_path / "environment"
    (place / "bin").mkdir(parents=True)
    for name in ("pearl", "python"):
        (place / "bin" / name).write_text(f'#!/usr/bin/env bash\nprintf "%q " {name} "$@"; echo; ${{THEN:-true}}\n')
        (place / "bin" / name).chmod(0o755)
    pieces = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "install.sh"))
    (place / ".pearl-installed-run").write_text(f"{hashlib.sha256(pieces).hexdigest()}  - {ROOT}\n")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    gone = ("CONDA_PREFIX", "SECONDS_AT_MOST")
    return {name: value for name, value in os.environ.items() if name not in gone} | {
        "VIRTUAL_ENV": str(place),
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "DATA": "data",  # seen from where the script is called
    }


def train(tools: dict[str, str], *stages: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "train_smollm2.sh"), *stages]
    cwd = Path(tools["VIRTUAL_ENV"]).parent
    return subprocess.run(command, cwd=cwd, env=tools | more, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_compared_is_what_is_there_in_a_folder_named_from_anywhere(tools, tmp_path):
    done = train(tools, "overlap")
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["--drop", "--against"], done.stderr
    (tmp_path / "data" / "gsm8k" / "test.jsonl").touch()
    assert train(tools, "overlap").stdout.split()[-1] == str(tmp_path / "data" / "gsm8k" / "test.jsonl")


def test_a_stage_that_is_not_there_is_refused_before_any_begins(tools):
    done = train(tools, "feature", "anwers")
    assert done.returncode == 2 and "there is no stage anwers: name some of questions answers" in done.stderr
    assert not done.stdout


def test_wrong_values_are_refused_before_any_stage_begins(tools):
    for more, said in (
        ({"SECONDS_AT_MOST": "0900"}, "error: SECONDS_AT_MOST must be a whole number"),
        ({"DATA": "nowhere"}, "error: set DATA to the folder that holds gsm8k/train.jsonl: 'nowhere' is none"),
        ({"DATA": ""}, "error: set DATA to the folder"),
    ):
        done = train(tools, "draft", **more)
        assert done.returncode == 2 and said in done.stderr and not done.stdout


def test_questions_are_not_begun_without_those_of_gsm8k(tools, tmp_path):
    done = train(tools, "questions")
    assert done.returncode == 2 and f"{tmp_path / 'data'} has no gsm8k/train.jsonl" in done.stderr and not done.stdout


def test_what_is_not_trained_is_not_diagnosed_in_silence(tools):
    if any((ROOT / "results").glob("*smollm2-135m*")):
        pytest.skip("something is trained in this checkout")
    done = train(tools, "diagnose")
    assert done.returncode == 2 and "results has no drafter to diagnose" in done.stderr


def test_a_call_ends_when_its_time_is_over_and_the_next_stage_does_not_begin(tools):
    begun = time.monotonic()
    done = train(tools, "draft", "more", SECONDS_AT_MOST="2", THEN="exec sleep 50")
    assert done.returncode == 124 and "the same call goes on there" in done.stderr
    assert len(done.stdout.splitlines()) == 1 and time.monotonic() - begun < 30
    done = train(tools, "feature", "draft", THEN="false")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, "a failure ends it too"
    assert len(train(tools, "draft", "more", SECONDS_AT_MOST="50").stdout.splitlines()) == 3
