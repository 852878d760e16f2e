"""The process that started this one: no child of ours outlives it, however it ends."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)
_LOOK_S = 0.25


def end_with_parent(parent: int, whose: str, role: str) -> None:
    """Of a process that we started, a program of ours: it ends, with one line and exit code 1, when its parent has
    ended. At once, as it may be in a forward, or waiting for a device, and has nothing to save."""

    def end_now() -> None:
        _log.warning("%s (process %d) has ended, so the %s ends too.", whose, parent, role)
        os._exit(1)

    when_orphaned(parent, end_now)


def when_orphaned(parent: int, then: Callable[[], None]) -> Callable[[], None]:
    """Calls `then`, in a thread of its own, once `parent` is not this process's parent any more. Returns what ends the
    watch.

    By looking now and then. The kernel's own signal (PR_SET_PDEATHSIG) comes when the *thread* that started a child
    ends, and a lost drafter is started anew by a thread that ends."""
    over = threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            if over.wait(_LOOK_S):
                return
        then()

    threading.Thread(target=watch, name="pearl-parent", daemon=True).start()
    return over.set
