"""Processes that make one piece of a long work after another, each of which takes minutes.

Ctrl-C ends with the pieces at hand, a second one at once. A worker that is killed ends the work, as the next one would
be too. No worker outlives the process that started it.

Knows: processes and signals. Refuses to know: what a piece is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, as_completed, wait
from typing import Any, TypeVar

from pearl.machine.parent import end_with_parent

SPAWN = multiprocessing.get_context("spawn")
Made = TypeVar("Made")


@contextlib.contextmanager
def workers(count: int, begin: Callable[..., None], *given: Any) -> Iterator[Executor]:
    """So many processes, each of which calls `begin(*given)` first. An error ends them at once.

    Raises `BrokenProcessPool` if one of them was killed."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(count, SPAWN, _begin, (os.getpid(), begin, given))
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, begin: Callable[..., None], given: Sequence[Any]) -> None:
    end_with_parent(parent, "the command", "worker")
    begin(*given)


def make_all(
    pool: Executor, make: Callable[[int], Made], pieces: Sequence[int], workers: int, take: Callable[[Made], None]
) -> None:
    """Hands pieces over as they are made; a piece may come twice. No more are begun than there are workers, which is
    what an interruption waits for."""
    left, begun = list(reversed(pieces)), list[Future[Made]]()
    with _interrupted_once_a_second():
        try:
            while left or begun:
                while left and len(begun) < workers:
                    with _uninterrupted():
                        begun.append(pool.submit(make, left.pop()))
                wait(begun, return_when=FIRST_COMPLETED)
                for future in [one for one in begun if one.done()]:
                    take(future.result())
                    begun.remove(future)
        except KeyboardInterrupt:
            if begun:
                print("What is at hand is made to the end; Ctrl-C again ends at once.", file=sys.stderr, flush=True)
            for future in as_completed(begun):
                take(future.result())
            raise


@contextlib.contextmanager
def _interrupted_once_a_second() -> Iterator[None]:
    """`timeout --signal=INT` sends its signal twice, to the command and to its group, and means one."""
    last = -1.0

    def interrupt(*_: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= 1:
            raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # else whoever started this one wants it deaf
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. A process that is started in it never hears of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
