"""What was measured is kept for this machine, these versions and these weights, and measured once."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from numerics import Recorder
from transformers import LlamaConfig

import pearl
from pearl.checkpoints import calibration, calibration_key
from pearl.checkpoints.calibration import measured_once
from pearl.checkpoints.calibration_key import of_code, of_weights
from pearl.checkpoints.checkpoint import Checkpoint
from pearl.checkpoints.drafters import load_draft
from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import load_target
from pearl.config.engine_config import EngineConfig
from pearl.core.token_buckets import LIMIT, TokenBuckets

FOUND = {"safe": [2, 3, 5], "cost_s": [n / 7 for n in range(LIMIT)], "exact": True}
KEY: dict[str, object] = {"model": "m", "devices": ("cpu",), "load_in": None}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Measurement:
    def __init__(self, seconds: float = 0.0):
        self.calls, self._seconds = 0, seconds

    def __call__(self) -> dict[str, object]:
        self.calls += 1
        time.sleep(self._seconds)
        return FOUND


def test_what_was_measured_once_is_remembered(tmp_path: Path):
    measure = Measurement()
    assert [measured_once(KEY, measure) for _ in range(3)] == [FOUND] * 3
    assert measure.calls == 1
    assert all(tmp_path in file.parents for file in tmp_path.rglob("*.json"))


def test_another_key_is_measured_anew():
    measure = Measurement()
    measured_once(KEY, measure)
    measured_once(KEY | {"model": "another"}, measure)
    assert measure.calls == 2


def test_of_several_that_ask_at_once_one_measures():
    measure = Measurement(seconds=0.05)
    asking = [threading.Thread(target=measured_once, args=(KEY, measure)) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert measure.calls == 1


@pytest.mark.parametrize(
    "devices, together", [(("cuda:0",), False), (("cuda:1", "cuda:0"), False), (("cuda:1",), True), (("cpu",), True)]
)
def test_of_models_on_one_gpu_one_is_measured_at_a_time(devices, together):
    begun, others = threading.Event(), []

    def first() -> dict[str, object]:
        other = threading.Thread(target=measured_once, args=(KEY | {"devices": devices, "model": "b"}, begun_then))
        others.append(other)
        other.start()
        assert begun.wait(5 if together else 0.3) == together
        return FOUND

    def begun_then() -> dict[str, object]:
        begun.set()
        return FOUND

    measured_once(KEY | {"devices": ("cpu",) if devices == ("cpu",) else ("cuda:0",)}, first)
    others[0].join()
    assert begun.is_set()


def test_a_measurement_that_fails_leaves_nothing():
    with pytest.raises(ZeroDivisionError):
        measured_once(KEY, lambda: {"a": 1 // 0})
    assert measured_once(KEY, Measurement()) == FOUND


# What a plan depends on: the weights themselves, our code, the machine. A target is loaded as an engine loads it.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(tmp_path / "target", seed=0)
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry a measurement of row counts."""
    calls: list[object] = []
    find = calibration.find_invariant_counts

    def counting(*args, **options):
        calls.append(args)
        return find(*args, **options)

    monkeypatch.setattr(calibration, "find_invariant_counts", counting)
    return calls


def save_weights(folder: Path, seed: int) -> None:
    tiny.random_model(LlamaConfig(**tiny.SIZES | {"vocab_size": tiny.SHARED}), seed).save_pretrained(folder)


def load(folder: Path, **options: object) -> TokenBuckets:
    config = EngineConfig(str(folder), "ngram", dtype="float32", max_length=200, **options)
    return load_target(preflight(config)).buckets


def test_the_same_weights_are_measured_once(folder, measured):
    assert load(folder) == load(folder)
    assert len(measured) == 1


def test_what_the_self_check_has_recorded_is_not_recorded_again(folder, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(calibration, "capture_for", lambda devices: recorder)
    config = EngineConfig(str(folder), str(folder), dtype="float32", max_length=200, cuda_graphs="on", max_sequences=2)
    target, (drafter, _) = load_target(preflight(config)), load_draft(preflight(config), 8)
    readers = [target.static, target.shared, drafter.static, drafter.shared]
    assert all(one.captured and one.shapes for one in readers)
    before = recorder.recorded
    for seed in range(2):
        target.read([*range(60), seed], 1)
    assert recorder.recorded == before


def test_where_passes_over_one_text_are_not_recorded_nobody_tries_those_over_several(folder, monkeypatch):
    tried = []

    def fails(run):
        tried.append(run)
        raise RuntimeError("not here")

    monkeypatch.setattr(calibration, "capture_for", lambda devices: fails)
    config = EngineConfig(str(folder), "ngram", dtype="float32", max_length=200, cuda_graphs="on", max_sequences=2)
    assert not load_target(preflight(config)).shared.captured
    assert len(tried) == 2, "one pass and one piece of a prompt"


def test_weights_replaced_in_place_are_measured_anew(folder, measured):
    """Under the same name, of the same size, with the time of the last change set back."""
    load(folder)
    before = (folder / "model.safetensors").stat()
    save_weights(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / "model.safetensors").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    load(folder)
    assert len(measured) == 2


def test_one_other_number_among_the_weights_is_other_weights(folder, monkeypatch):
    """Where the file system keeps no time that can't be set back, the content tells."""
    checkpoint, file = Checkpoint.of(str(folder)), folder / "model.safetensors"
    (name, size, *_, before) = of_weights(checkpoint)[0]
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    assert of_weights(checkpoint)[0][:2] == (name, size) and of_weights(checkpoint)[0][-1] != before


def test_a_large_checkpoint_is_not_read_whole(tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 34)  # 16 GB of zeros that take no room
    began = time.process_time()
    before = of_weights(Checkpoint(str(tmp_path)))
    assert time.process_time() - began < 1
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert of_weights(Checkpoint(str(tmp_path)))[0][-1] != before[0][-1]


def test_another_dtype_and_other_threads_are_measured_anew(folder, measured):
    load(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # other threads, other sums
    try:
        load(folder)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2
    load_target(preflight(EngineConfig(str(folder), "ngram", dtype="bfloat16", max_length=200)))
    assert len(measured) == 3


def test_another_version_of_the_code_that_decides_bits_is_measured_anew(folder, measured, tmp_path, monkeypatch):
    package = tmp_path / "pearl"
    shutil.copytree(Path(pearl.__file__).parent, package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    assert of_code(package) == of_code()
    (package / "roles" / "target.py").write_text("# chooses among forwards, and makes none")
    of_code.cache_clear()
    assert of_code(package) == of_code()
    with open(package / "models" / "linear.py", "a") as module:
        module.write("# another kernel")
    of_code.cache_clear()
    other = of_code(package)
    assert other != of_code()
    load(folder)
    monkeypatch.setattr(calibration_key, "of_code", lambda: other)
    load(folder)
    assert len(measured) == 2
