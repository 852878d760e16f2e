"""Which CPU cores a process runs on. No torch here: a process pins itself before torch makes its threads.

Two roles on one CPU are two devices if they share no core. Cores are handed out whole: the hardware threads of one stay
together as long as there are several.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

from pearl.errors import UsageError

_MOST = 1 << 16  # CPUs of a machine; a range of more is not worth counting


def available() -> list[int]:
    """The CPUs this process may use, those of one core side by side."""
    return sorted(os.sched_getaffinity(0), key=_core)


def split(cpus: list[int], drafter_works: bool) -> tuple[list[int], list[int]]:
    """(target's, drafter's): half each for two models, one core for a drafter without one. A single core is shared."""
    cores: list[list[int]] = []
    for cpu in cpus:
        if cores and _core(cores[-1][0])[:2] == _core(cpu)[:2]:
            cores[-1].append(cpu)
        else:
            cores.append([cpu])
    if len(cores) == 1:
        cores = [[cpu] for cpu in cpus]
    if len(cores) == 1:
        return cpus, cpus
    cut = (len(cores) + 1) // 2 if drafter_works else len(cores) - 1
    return [*chain(*cores[:cut])], [*chain(*cores[cut:])]


def parse(text: str) -> list[int]:
    """`"0-3,8"` as a list of CPUs. Raises `UsageError` where one is not there."""
    cpus: list[int] = []
    try:
        for part in str(text).split(","):  # YAML reads a single core as a number
            first, dash, last = part.partition("-")
            named = range(int(first), int(last if dash else first) + 1)
            cpus += named if len(named) <= _MOST else [-1]
    except (ValueError, OverflowError):
        raise UsageError(f"cores must be written like 0-3,8, not {text!r}.") from None
    if not cpus or not set(cpus) <= os.sched_getaffinity(0):
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise UsageError(f"cores {text} are not all available to this process; it may use {there}.")
    return cpus


def pin(cpus: list[int]) -> None:
    """Keeps the calling thread, and those it starts from now on, to these CPUs."""
    os.sched_setaffinity(0, cpus)


def _core(cpu: int) -> tuple[int, int, int]:
    """(package, core, cpu)"""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (
            int((topology / "physical_package_id").read_text()),
            int((topology / "core_id").read_text()),
            cpu,
        )
    except (OSError, ValueError):  # some virtual machines don't tell
        return 0, cpu, cpu
