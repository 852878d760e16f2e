"""CPU cores are named as they are there, and two roles share none."""

import subprocess
import sys

import pytest

from pearl.errors import UsageError
from pearl.machine import cores


def test_cores_are_written_as_ranges(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores.parse("0-3,6") == [0, 1, 2, 3, 6]
    assert cores.parse("5") == [5]
    assert cores.parse("0,0-1") == [0, 1]
    for text in ("", "x", "1-", "-1", "3-1", "0,,1", "0.5"):
        with pytest.raises(UsageError, match="cores"):
            cores.parse(text)
    with pytest.raises(
        UsageError, match=r"cores 6-8 are not all available to this process; it may use 0,1,2,3,4,5,6,7"
    ):
        cores.parse("6-8")


def machine(monkeypatch, threads_of_core: list[list[int]]) -> list[int]:
    """A machine with these hardware threads in each core. Returns its CPUs as `available` does."""
    core = {cpu: (0, i, cpu) for i, cpus in enumerate(threads_of_core) for cpu in cpus}
    monkeypatch.setattr(cores, "_core", core.__getitem__)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(core))
    return cores.available()


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(
    "shape", [[[0], [1]], [[0, 4], [1, 5], [2, 6], [3, 7]], [[0], [1], [2]], [[0, 1, 2, 3]], [[0, 1]]]
)
def test_two_roles_share_no_cpu_and_leave_none_idle(monkeypatch, shape, works):
    cpus = machine(monkeypatch, shape)
    target, draft = cores.split(cpus, drafter_works=works)
    assert target and draft
    assert sorted(target + draft) == sorted(cpus)
    if len(shape) > 1:  # the hardware threads of a core stay together
        assert all(set(core) <= set(target) or set(core) <= set(draft) for core in shape)
    assert len(target) >= len(draft)


def test_a_drafter_without_a_model_gets_one_core(monkeypatch):
    cpus = machine(monkeypatch, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert cores.split(cpus, drafter_works=False) == ([0, 4, 1, 5, 2, 6], [3, 7])
    assert cores.split(cpus, drafter_works=True) == ([0, 4, 1, 5], [2, 6, 3, 7])


def test_replicas_share_no_core_as_long_as_there_are_enough(monkeypatch):
    cpus = machine(monkeypatch, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert [cores.share(cpus, number, 2) for number in range(2)] == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert [cores.share(cpus, number, 3) for number in range(3)] == [[0, 4], [1, 5], [2, 6, 3, 7]]
    assert [cores.share(cpus, number, 8) for number in range(8)] == [[cpu] for cpu in cpus]
    assert cores.share(cpus, 8, 9) == cpus


def test_a_thread_that_is_kept_to_some_cores_starts_processes_on_all():
    there = cores.available()
    command = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]

    def started() -> str:
        cores.pin(there[:1])
        with cores.allowed(there):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert cores.in_a_thread(started) == f"{sorted(there)}\n"


def test_a_single_cpu_is_shared(monkeypatch):
    cpus = machine(monkeypatch, [[3]])
    assert cores.split(cpus, drafter_works=True) == ([3], [3])
