"""The host's own time of a pass."""

from __future__ import annotations

import pytest
import tiny
import torch

from pearl.bench import host_time


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_thread_that_is_timed_waits_for_no_other(two_threads, monkeypatch):
    """On a loaded machine those that share a sum with it come late, and it spins until they do."""
    reader = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()))
    reader.enable_static_shapes()
    threads = []
    passes = host_time._passes

    def noted(*args):
        threads.append(torch.get_num_threads())
        return passes(*args)

    monkeypatch.setattr(host_time, "_passes", noted)
    found = host_time.host_times(reader, 0.8, 2)
    assert set(found) == set(host_time.MODES) and set(threads) == {1}
    assert torch.get_num_threads() == 2
