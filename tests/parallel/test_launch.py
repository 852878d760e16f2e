"""What a process is, is decided by what a launcher says, before there is an engine; and nothing of it stays."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore
from transformers.utils import logging as transformers_logging

from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.engine import Engine
from pearl.errors import CheckpointError, StorageError, UsageError
from pearl.machine import cores, launcher
from pearl.machine.cores import contiguous_parts
from pearl.machine.launcher import Processes
from pearl.parallel.child import WorkerSpec
from pearl.parallel.launch import arrange, launch
from pearl.parallel.replicas import POLL_S, ReplicaGroup, assign_devices
from pearl.parallel.world import World

pytestmark = pytest.mark.usefixtures("own_cache")


def launched(monkeypatch: pytest.MonkeyPatch, *facts: int) -> None:
    """As if it had been joined: rank, size, local rank, local size."""
    monkeypatch.setattr(launcher, "_joined", Processes(*facts))


@pytest.mark.parametrize(
    "rank, local, here, world",
    [
        (0, 0, 3, World(0, 2, tp_size=2, local_tp_size=2)),
        (1, 1, 3, World(0, 2, tp_rank=1, tp_size=2, local_tp_size=2)),
        (2, 2, 3, World(1, 2, tp_size=2, local_tp_size=2)),
        (1, 1, 2, World(0, 2, two_hosts=True, tp_rank=1, tp_size=2, local_tp_size=2)),
        (2, 0, 1, World(1, 2, two_hosts=True, tp_size=2, local_tp_size=0)),
        (1, 0, 2, World(0, 2, tp_rank=1, tp_size=2, local_tp_size=1)),
    ],
)
def test_the_last_rank_is_the_drafter_wherever_the_ranks_are(rank, local, here, world):
    processes = Processes(rank, 3, local, here)
    assert World.of(processes, 2) == replace(world, here=processes)
    assert world.roles == (("draft",) if here == 1 else ("target",) if world.two_hosts else ("target", "draft"))


@pytest.mark.parametrize(
    "size, options, says",
    [
        (2, {"tensor_parallel_size": 2}, "are 3: use --num_processes 3"),
        (6, {"tensor_parallel_size": 2}, "has no replicas"),
        (3, {}, "started 3 processes.*use --num_processes 2"),
        (2, {"mode": "sd", "processes": 1}, "processes is 1: use plain python"),
    ],
)
def test_a_launcher_of_another_number_is_refused(size, options, says, pair, monkeypatch):
    launched(monkeypatch, 0, size, 0, size)
    with pytest.raises(UsageError, match=says):
        Engine.from_pretrained(*pair, **options)


def test_ranks_get_neighbouring_cores():
    assert contiguous_parts([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert contiguous_parts([0], 3) == [[0], [0], [0]]


def test_a_drafter_on_a_machine_of_its_own_has_all_cores_of_it(pair):
    config = EngineConfig(*pair, dtype="float32", tensor_parallel_size=2)
    layout = arrange(config, Schedule.of("pearl"), None, World.of(Processes(2, 3, 0, 1), 2))
    assert (layout.draft_cpus, layout.tp_cpus) == (cores.available(), [])


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes(device="cuda" if torch.cuda.is_available() else "cpu")
    assert launcher.join(1.0) == alone and World.join() == World(0, 1, here=alone)


def test_what_is_wrong_is_said_by_the_first_rank_alone(pair, monkeypatch):
    config = EngineConfig(*pair, dtype="float32")
    for rank, raised in ((0, UsageError), (1, SystemExit)):
        launched(monkeypatch, rank, 2, rank, 2)
        with pytest.raises(raised) as caught:
            launch(config, Schedule.of("sd"), processes=1)
        assert raised is UsageError or caught.value.code == 2
    launched(monkeypatch, 1, 2, 0, 1)  # on a machine of its own, where others may be right
    with pytest.raises(UsageError):
        launch(config, Schedule.of("sd"), processes=1)


def state() -> tuple[object, ...]:
    """Whatever belongs to the whole process, as its program has it."""
    own = os.sched_getaffinity(0), torch.get_num_threads(), sys.getswitchinterval(), dict(os.environ)
    theirs = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logger = logging.getLogger("pearl")
    return *own, *theirs, dist.is_initialized(), dist.all_reduce, logger.level, list(logger.handlers)


@pytest.mark.slow
def test_an_engine_that_can_not_be_made_leaves_the_process_as_it_was(pair, tmp_path):
    before, broken = state(), shutil.copytree(pair[0], tmp_path / "target")
    (broken / "model.safetensors").unlink()
    core = str(min(os.sched_getaffinity(0)))
    with pytest.raises(CheckpointError):
        Engine.from_pretrained(str(broken), pair[1], dtype="float32", target_cores=core)
    assert state() == before
    with Engine.from_pretrained(*pair, dtype="float32", max_length=100, target_cores=core) as engine:
        engine.generate("the", SamplingParams(max_new_tokens=4))
        assert state() == before and cores.in_a_thread(state) == before
    assert state() == before


@pytest.mark.slow
def test_a_program_may_forbid_that_its_process_is_kept_to_cores(pair):
    before = state()
    with Engine.from_pretrained(*pair, dtype="float32", max_length=100, pin_cores="off") as engine:
        there = psutil.Process(engine.runtime.drafter_pid).cpu_affinity()
        for mode in ("pearl", "ar", "ar-all"):
            engine.generate("the", SamplingParams(max_new_tokens=4), mode=mode)
            assert state() == before
        threads = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
    assert {*there} == os.sched_getaffinity(0) and all(cpus == os.sched_getaffinity(0) for cpus in threads)
    assert state() == before


def test_a_started_process_is_told_all_in_one_text(pair):
    spec = WorkerSpec(EngineConfig(*pair, max_length=99), 29500, [0, 2], number=1, deadline_s=3.0)
    assert WorkerSpec.from_json(spec.to_json()) == spec and spec.parent == os.getpid()


def test_ranks_are_replicas_of_two():
    for rank, local, world in [
        (0, 0, World(0, 2, 0, 4, 0, 2)),
        (3, 3, World(1, 2, 1, 4, 1, 2)),
        (5, 1, World(1, 2, 2, 4, 0, 2)),
    ]:
        processes = Processes(rank, 8, local, 4)
        assert World.of(processes) == replace(world, here=processes)
    apart = World.of(Processes(1, 2, 0, 1))  # a target and its drafter on two machines
    assert apart == World(1, 2, 0, 1, 0, 1, two_hosts=True, here=apart.here)
    assert apart.roles == ("draft",) and World(0, 2).roles == ("target", "draft")


def test_replicas_on_one_machine_have_their_own_cores_and_name_none(pair, monkeypatch):
    monkeypatch.setattr("pearl.machine.cores.available", lambda: [0, 1, 2, 3])
    monkeypatch.setattr("pearl.machine.cores.parse", lambda text, _: [int(cpu) for cpu in text.split(",")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = EngineConfig(*pair)
    assert assign_devices(config, World(0, 2)) == config
    placed = [assign_devices(config, World(0, 2, n, 2, n, 2)) for n in range(2)]
    assert [(one.target_cores, one.draft_cores) for one in placed] == [("0", "1"), ("2", "3")]
    with pytest.raises(UsageError, match="name no devices and no cores"):
        assign_devices(placed[0], World(0, 2, 0, 2, 0, 2))


def test_replicas_share_no_file_of_their_memories(pair):
    config = EngineConfig(*pair, memory=1, memory_file="memory.npz")
    assert assign_devices(config, World(0, 2)).memory_file
    for world in (World(0, 2, 0, 2, 0, 2), World(0, 2, 1, 2, 0, 1)):  # on one machine, on two
        with pytest.raises(UsageError, match="leave memory_file out"):
            assign_devices(config, world)
        with pytest.raises(UsageError, match="one file keeps one: leave trace out"):
            assign_devices(EngineConfig(*pair, trace="run.json"), world)


def test_replicas_on_one_machine_have_their_own_gpus(pair, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    config = EngineConfig(*pair)

    def devices(world: World) -> tuple[str, str]:
        placed = assign_devices(config, world)
        return placed.target_device, placed.draft_device

    assert [devices(World(0, 2, n, 2, n, 2)) for n in range(2)] == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]
    assert devices(World(0, 2)) == ("auto", "cuda:1") and devices(World(0, 1)) == ("auto", "auto")
    assert devices(World.of(Processes(1, 2, 0, 1))) == ("auto", "cuda:0")  # of a machine of its own
    assert devices(World.of(Processes(0, 2, 0, 2, device="cpu"))) == ("cpu", "cpu")  # accelerate launch --cpu
    with pytest.raises(UsageError, match="3 replicas need two GPUs each, but this machine has 4"):
        assign_devices(config, World(0, 2, 0, 3, 0, 3))


def test_what_the_first_replica_can_not_begin_is_raised_in_all(monkeypatch):
    store = HashStore()
    monkeypatch.setattr(launcher, "store", lambda: store)

    def full() -> list[int]:
        raise StorageError("config.json can't be written.")

    for replica in (0, 1):
        with pytest.raises(StorageError, match=r"config\.json can't be written"):
            ReplicaGroup(World(0, 2, replica, 2)).complete(full, lambda units, name: None)


def test_a_replica_leaves_when_the_first_has_gathered_everything(monkeypatch):
    store, left = HashStore(), []
    monkeypatch.setattr(launcher, "store", lambda: store)
    first, second = (ReplicaGroup(World(0, 2, replica, 2)) for replica in (0, 1))
    leaving = threading.Thread(target=lambda: (second.leave(), left.append("second")))
    leaving.start()
    time.sleep(3 * POLL_S)
    assert not left  # the launcher would end the first one while it still gathers
    first.leave()
    leaving.join(timeout=30)
    assert left == ["second"]
