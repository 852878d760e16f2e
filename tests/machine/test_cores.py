"""CPU cores are named as they are there, and two roles share none."""

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


def test_a_single_cpu_is_shared(monkeypatch):
    cpus = machine(monkeypatch, [[3]])
    assert cores.split(cpus, drafter_works=True) == ([3], [3])
