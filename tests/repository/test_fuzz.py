"""Whatever people write, what comes back is data or a sentence. More of it: python tests/tools/fuzz.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import fuzz
import pytest
import tiny
import torch

from pearl.config.inputs import parse_json, parse_yaml, read_text
from pearl.core.params import SamplingParams
from pearl.engine import Engine
from pearl.errors import LONGEST, CheckpointError, UsageError


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_nothing_that_people_write_ends_in_a_traceback(tmp_path, seed):
    counts, failures = fuzz.run(1000, seed, tmp_path)
    assert failures == {}
    assert counts["taken"] > 50 and counts["refused"] > 500


def test_the_fuzzer_finds_what_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.cores, "parse", lambda text: 1 // 0)
    counts, failures = fuzz.run(200, 0, tmp_path)
    assert any("ZeroDivisionError" in name for name in failures) and counts["failed"] > 5


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: &x [1]\nb: *x", "references"),
        ("a: 1\na: 2", "a is given twice"),
        ("a: " + "[" * 5000, "brackets within brackets"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("1: a", "must be a mapping"),
        ("a: 2020-99-99", "is not YAML"),
    ],
)
def test_yaml_is_plain_data(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        parse_yaml(text, "The config")


def test_json_of_any_depth_and_length_is_data_or_a_sentence():
    for text in ("[" * 100_000, "9" * 10_000, '"\\ud800"x', "{" * 9, "\x00"):
        with pytest.raises(UsageError, match="is not JSON"):
            parse_json(text, "The line")
    assert parse_json(json.dumps({"a": "x" * 1_000_000}), "The line")["a"][:2] == "xx"


def test_sentences_are_short_and_can_be_printed():
    error = UsageError("a \ud800" + "x" * 100_000)
    assert len(str(error)) == LONGEST
    str(error).encode()
    for path in ("\x00", "x" * 5000, "/", "nowhere"):
        with pytest.raises(UsageError, match="can't be read"):
            read_text(path, "The file")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tiny.save_pair(tmp_path_factory.mktemp("pair"))


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def other_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def more_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


class Payload:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


def a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def a_pickle_of_weights(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncated, no_header, other_shapes, more_layers, a_pickle, a_pickle_of_weights])
def test_a_damaged_checkpoint_is_refused_in_a_sentence(pair, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(pair[0], tmp_path / "target")
    damage(folder)
    with pytest.raises(CheckpointError, match="target"):
        Engine.from_pretrained(str(folder), mode="ar", dtype="float32", max_length=300)
    assert not (tmp_path / "pickle-was-run").exists()


def test_code_of_a_checkpoint_runs_only_if_asked(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'code-was-run')!r}, 'w').close()\nclass Config: pass\n")
    with pytest.raises(UsageError, match="target"):
        Engine.from_pretrained(str(folder), mode="ar", dtype="float32", max_length=300)
    assert not (tmp_path / "code-was-run").exists()


def test_prompts_at_the_edges(pair):
    with Engine.from_pretrained(pair[0], mode="sd", processes=1, dtype="float32", max_length=64) as engine:
        one = SamplingParams(max_new_tokens=1)
        special = engine.generate([0, 0, 0], SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert len(special.tokens) == 4
        assert len(engine.generate([7] * 63, one).tokens) == 1  # one token under the context
        for prompt in ([7] * 64, [7] * 65, "x" * 100_000):
            with pytest.raises(UsageError, match="are more than the 64 that a text may have"):
                engine.generate(prompt, one)
        assert engine.generate([], one) == []
        for prompt in ("", [None], [{}], [{"role": "user"}], [10**30], [float("nan")], 5, None, {"a": 1}, [[]]):
            with pytest.raises(UsageError):
                engine.generate(prompt, one)
        assert len(engine.generate("a\x00\ud7ff\ufffd", one).tokens) == 1
