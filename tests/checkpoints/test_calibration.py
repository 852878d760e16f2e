"""What was measured is kept for this machine, these versions and this model, and measured once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from pearl.checkpoints.calibration import measured_once
from pearl.core.token_buckets import LIMIT

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


def test_another_model_and_other_threads_are_measured_anew():
    measure = Measurement()
    measured_once(KEY, measure)
    measured_once(KEY | {"model": "another"}, measure)
    assert measure.calls == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # other threads, other sums
    try:
        measured_once(KEY, measure)
    finally:
        torch.set_num_threads(threads)
    assert measure.calls == 3


def test_of_several_that_ask_at_once_one_measures():
    measure = Measurement(seconds=0.05)
    asking = [threading.Thread(target=measured_once, args=(KEY, measure)) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert measure.calls == 1


def test_a_measurement_that_fails_leaves_nothing():
    with pytest.raises(ZeroDivisionError):
        measured_once(KEY, lambda: {"a": 1 // 0})
    assert measured_once(KEY, Measurement()) == FOUND
