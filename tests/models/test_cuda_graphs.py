"""How recordings are asked of torch; a GPU has to show what it makes of that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from pearl.models.cuda_graphs import CudaGraphs
from pearl.models.static_shapes.recordings import Recordings


class Device:
    """What this asks of `torch.cuda`: streams, pools, and graphs whose recording goes wrong where its code does."""

    def __init__(self) -> None:
        self.now = "usual"  # the thread's stream
        self.pools: list[str] = []
        self.into: list[str] = []  # pools that the allocator serves a recording from
        self.asked: list[tuple[str, str]] = []  # pool and stream of each recording
        self.replayed = 0

    def names(self) -> dict[str, object]:
        return {
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "stream": self.stream,
            "Stream": lambda: SimpleNamespace(name="recording", wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(name=self.now, wait_stream=lambda other: None),
            "set_stream": lambda stream: setattr(self, "now", stream.name),
            "synchronize": lambda: None,
            "graph_pool_handle": self.pool,
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
        }

    def replay(self) -> None:
        self.replayed += 1

    def pool(self) -> str:
        self.pools.append(f"pool {len(self.pools)}")
        return self.pools[-1]

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, made: object, pool: str, stream: SimpleNamespace, capture_error_mode: str) -> Iterator[None]:
        """As torch has it: whatever its code raises, it is the end of the recording that raises, and then the stream
        stays, and the allocator where it was."""
        before, self.now = self.now, stream.name
        self.asked.append((pool, stream.name))
        self.into.append(pool)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.into.remove(pool)
        self.now = before

    def end_allocate_to_pool(self, device: int, pool: str) -> None:
        if pool not in self.into:
            raise RuntimeError("not recording to this pool")
        self.into.remove(pool)


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    for name, value in device.names().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_allocate_to_pool, raising=False)
    return device


def test_all_recordings_share_one_pool_on_one_stream(device):
    """Torch reuses memory of a pool on the stream on which it was taken, and on no other."""
    capture = CudaGraphs(torch.device("cuda:0"))
    for replay in [capture(lambda: None) for _ in range(3)]:
        replay()
    assert device.asked == [("pool 0", "recording")] * 3 and device.replayed == 3
    assert device.now == "usual" and not device.into


@pytest.mark.parametrize("fails_at", [4, 2], ids=["recording", "warming up"])
def test_after_a_recording_that_fails_code_runs_where_it_ran_before(device, fails_at):
    runs, streams = iter(range(1, 100)), []

    def code() -> None:
        streams.append(device.now)
        if next(runs) == fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")

    recordings = Recordings(CudaGraphs(torch.device("cuda:0")))
    recordings.run("shape", code)
    assert recordings.failed and device.now == "usual" and not device.into
    recordings.run("shape", code)
    assert streams[-1] == "usual"


def test_a_recording_after_one_that_failed_has_a_pool_of_its_own(device):
    capture = CudaGraphs(torch.device("cuda:0"))
    runs = iter(range(1, 100))

    def code() -> None:
        if next(runs) == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        capture(code)
    capture(lambda: None)
    assert [pool for pool, _ in device.asked] == ["pool 0", "pool 1"]


def test_an_error_without_words_is_a_failure_too():
    def fails(run: object) -> None:
        raise RuntimeError

    recordings = Recordings(fails)
    recordings.run("shape", lambda: None)
    assert recordings.failed == "RuntimeError" and not recordings.captured
