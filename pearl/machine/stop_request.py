"""A request to stop, by Ctrl-C or SIGTERM, of work that ends by itself where nothing of it is lost.

A second request, a second or more later, ends at once: `timeout --signal=INT` sends its signal twice and means one.

Knows: signals. Refuses to know: what the work is.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def made(self) -> bool:
        return self._first is not None

    def take(self, *_: object) -> None:
        """A signal's handler. Raises `KeyboardInterrupt` for a second request."""
        now = time.monotonic()
        if self._first is not None and now - self._first >= 1:
            raise KeyboardInterrupt
        self._first = now if self._first is None else self._first


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """In here SIGINT and SIGTERM mean a request. One that was ignored before stays ignored. Outside of the main thread,
    which alone gets signals, nothing changes."""
    request = StopRequest()
    heard = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    usual = {number: signal.getsignal(number) for number in heard}
    usual = {number: handler for number, handler in usual.items() if handler is not signal.SIG_IGN}
    for number in usual:
        signal.signal(number, request.take)
    try:
        yield request
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
