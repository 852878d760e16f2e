"""What the stand-in for a GPU finds: waits of the host by every name, and memory that is reused too early."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from stand_in import NAME, DeviceTensor, Gpu, HiddenWait, PinnedReuse

from pearl.machine.transfers import on_host, sent
from pearl.models.static_shapes.inputs import StaticInputs
from pearl.models.timing import timed


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with Gpu() as gpu:
        yield gpu


@pytest.mark.parametrize(
    "write_again",
    [
        lambda pinned: pinned.fill_(7),
        lambda pinned: torch.add(torch.ones(4), 1, out=pinned),
    ],
    ids=["in place", "out"],
)
@pytest.mark.parametrize(
    "copy",
    [
        lambda pinned: pinned.to(NAME, non_blocking=True),
        lambda pinned: torch.empty(4, device=NAME).copy_(pinned, non_blocking=True),
    ],
    ids=["to", "copy_"],
)
def test_page_locked_memory_that_is_written_while_it_is_copied_is_found(gpu, copy, write_again):
    pinned = torch.zeros(4, pin_memory=True)
    copy(pinned)
    with pytest.raises(PinnedReuse):
        write_again(pinned)
    arrived = torch.cuda.Event()
    arrived.record()
    arrived.synchronize()
    write_again(pinned)


@pytest.mark.parametrize(
    "wait",
    [
        lambda there: torch.zeros(()).copy_(there[0]),
        lambda there: there.cpu(),
        lambda there: torch.zeros(4).to(NAME, non_blocking=True),  # of ordinary memory
        lambda there: there.repeat_interleave(there.long()),
        lambda there: torch.bincount(there.long()),
        lambda there: torch.allclose(there, there),
        lambda there: torch.multinomial(there, 1),
    ],
    ids=["number", "copy", "ordinary memory", "repeat_interleave", "bincount", "allclose", "multinomial"],
)
def test_what_makes_the_host_wait_is_found_whatever_its_name(gpu, wait):
    with pytest.raises(HiddenWait):
        wait(DeviceTensor(torch.arange(6.0)))


def test_a_buffer_that_is_filled_while_it_is_copied_is_found(gpu, monkeypatch):
    def fill() -> None:  # as forwards of a long prompt do, between which nobody waits
        inputs = StaticInputs(torch.device("cuda:0"), 256, 1)
        for number in range(5):
            inputs.fill(np.full((5, 16), number), None)

    fill()
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    with pytest.raises(PinnedReuse):
        fill()


def test_a_timing_ends_with_the_devices_work_whatever_comes_back(gpu):
    for make, device in ((lambda: None, torch.device("cuda:0")), (lambda: sent(torch.ones(2), NAME), None)):
        with gpu.may_wait():
            before = gpu.allowed
            timed(make, device)
        assert gpu.allowed == before + 1


@torch.inference_mode()
def test_what_is_sent_does_not_wait_and_what_is_fetched_waits_once(gpu):
    there = sent(torch.arange(5), torch.device("cuda:0"))
    assert there.is_cuda and not gpu.waits
    assert on_host(there + 1).tolist() == [1, 2, 3, 4, 5] and gpu.waits == 1
