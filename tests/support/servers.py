"""A server of tiny models in this process, which real clients reach through a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pearl.config.server_config import ServerConfig
from pearl.engine import Engine
from pearl.server import run
from pearl.server.life import Service


class Served:
    """A server that runs in a thread of its own."""

    def __init__(self, engine: Engine, **options: object):
        config = ServerConfig(port=0, **options)
        self.engine = engine
        self.service = Service(lambda: engine, config, "tiny")
        self.server = run.Server(self.service)
        sock = run.listen(config)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, args=(sock,))
        self._thread.start()
        while not self.service.settled.is_set():
            self._thread.join(0.01)

    def _live(self, sock: object) -> None:
        self._loop.run_until_complete(self.server.serve(sockets=[sock]))
        self._loop.close()

    def drain(self) -> None:
        """As SIGTERM does."""
        self._loop.call_soon_threadsafe(self.server.drain)

    def close(self) -> None:
        if self._thread.is_alive():
            self.drain()
            self._thread.join(30)
        assert not self._thread.is_alive(), "a server that does not end"


@contextmanager
def served(engine: Engine, **options: object) -> Iterator[Served]:
    """The engine is closed with it."""
    one = Served(engine, **options)
    try:
        yield one
    finally:
        one.close()
