"""Which CPU cores a process runs on. No torch here: a process pins itself before torch makes its threads.

Two roles on one CPU are two devices if they share no core. Cores are handed out whole: the hardware threads of one stay
together as long as there are several.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

from pearl.errors import UsageError

Unit = TypeVar("Unit")
_MOST = 1 << 16  # CPUs of a machine; a range of more is not worth counting


def available() -> list[int]:
    """The CPUs this process may use, those of one core side by side."""
    return sorted(os.sched_getaffinity(0), key=_core)


def share(cpus: list[int], number: int, count: int) -> list[int]:
    """Part `number` of `count`, of neighbouring cores; of hardware threads, or all of them, where there are too few."""
    cores = _whole(cpus)
    units = cores if len(cores) >= count else [[cpu] for cpu in cpus]
    return [*chain(*contiguous_parts(units, count)[number])]


def contiguous_parts(units: Sequence[Unit], parts: int) -> list[list[Unit]]:
    """These CPUs or cores for so many processes, neighbours together; too few are shared by all."""
    if len(units) < parts:
        return [list(units)] * parts
    ends = [len(units) * part // parts for part in range(parts + 1)]
    return [list(units[first:last]) for first, last in pairwise(ends)]


def _whole(cpus: list[int]) -> list[list[int]]:
    """The CPUs by core."""
    cores: list[list[int]] = []
    for cpu in cpus:
        if cores and _core(cores[-1][0])[:2] == _core(cpu)[:2]:
            cores[-1].append(cpu)
        else:
            cores.append([cpu])
    return cores


def split(cpus: list[int], drafter_works: bool) -> tuple[list[int], list[int]]:
    """(target's, drafter's): half each for two models, one core for a drafter without one. A single core is shared."""
    cores = _whole(cpus)
    if len(cores) == 1:
        cores = [[cpu] for cpu in cpus]
    if len(cores) == 1:
        return cpus, cpus
    cut = (len(cores) + 1) // 2 if drafter_works else len(cores) - 1
    return [*chain(*cores[:cut])], [*chain(*cores[cut:])]


def parse(text: str, option: str = "cores") -> list[int]:
    """`"0-3,8"` as a list of CPUs. Raises `UsageError`, which names the `option`, where one is not there."""
    cpus: list[int] = []
    try:
        for part in str(text).split(","):  # YAML reads a single core as a number
            first, dash, last = part.partition("-")
            named = range(int(first), int(last if dash else first) + 1)
            if not named:
                raise ValueError("the last before the first")
            cpus += named if len(named) <= _MOST else [-1]
    except (ValueError, OverflowError):
        raise UsageError(f"{option} must be written like 0-3,8, not {text!r}.") from None
    if not cpus or not set(cpus) <= os.sched_getaffinity(0):
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise UsageError(f"{option} {text} are not all available to this process; it may use {there}.")
    return [*dict.fromkeys(cpus)]


@contextmanager
def allowed(cpus: Sequence[int]) -> Iterator[None]:
    """The calling thread, and what it starts, may run on these CPUs meanwhile, if that is permitted."""
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def pin(cpus: list[int]) -> None:
    """Keeps the calling thread, and those it starts from now on, to these CPUs."""
    os.sched_setaffinity(0, cpus)


@contextmanager
def running_on(cpus: Sequence[int]) -> Iterator[None]:
    """The calling thread is kept to these CPUs, and its torch to as many threads; afterwards both are as before. Other
    threads are as they were, also those that begin meanwhile: torch keeps a number for them, which each setting of it
    changes, so a thread that ends at once puts that back."""
    import torch

    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(len(cpus))
    in_a_thread(lambda: torch.set_num_threads(threads))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread of its own. The threads that torch keeps for it end with it."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="pearl-load", daemon=True).start()
    return done.result()


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
