"""A server of tiny models in this process, which real clients reach through a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pearl.config.server_config import ServerConfig
from pearl.core.params import SamplingParams
from pearl.engine import Engine, Generation
from pearl.server import run, sockets
from pearl.server.life import Service

LENGTH, PLACES = 300, 2
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "the thing"}]
LONG = {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "seed": 1, "temperature": 1}


def engine(target: str, draft: str, **options: Any) -> Engine:
    """Of a tiny pair, in this process alone."""
    core = str(min(os.sched_getaffinity(0)))
    given = {"dtype": "float32", "max_length": LENGTH, "mode": "sd", "processes": 1, "max_sequences": PLACES}
    return Engine.from_pretrained(target, draft, target_cores=core, **given | options)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, temperature=0.0)


class _Kept:
    """An engine that outlives its server."""

    def __init__(self, engine: Engine):
        self._kept = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)

    def close(self) -> None:
        """It is for the next server."""


class Served:
    """A server that runs in a thread of its own. The engine stays open."""

    def __init__(self, make: Engine | Callable[[], Any], settled: bool = True, **options: Any):
        """`make`: an engine, or what loads one. `settled`: wait until it is there."""
        config = ServerConfig(**{"port": 0} | options)
        self.service = Service(make if callable(make) else lambda: _Kept(make), config, "tiny")  # type: ignore[arg-type,return-value]
        self.server = run.Server(self.service)
        sock = sockets.listen(config)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, args=(sock,))
        self._thread.start()
        while settled and not self.service.settled.is_set():
            self._thread.join(0.01)

    def _live(self, sock: object) -> None:
        self._loop.run_until_complete(self.server.serve(sockets=[sock]))  # type: ignore[list-item]
        self._loop.close()

    def drain(self) -> None:
        """As SIGTERM does."""
        self._loop.call_soon_threadsafe(self.server.drain)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        if not self.ended:
            self.drain()
            self._thread.join(30)
        assert self.ended, "a server that does not end"


@contextmanager
def served(make: Engine | Callable[[], Any], **options: Any) -> Iterator[Served]:
    one = Served(make, **options)
    try:
        yield one
    finally:
        one.close()


@contextmanager
def busy(engine: Engine) -> Iterator[Callable[[], None]]:
    """The engine's thread does something else, so that no text begins until what this gives is called."""
    begun, enough = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        enough.wait(30)

    thread = threading.Thread(target=lambda: engine.exclusively(wait))
    thread.start()
    begun.wait(30)
    try:
        yield enough.set
    finally:
        enough.set()
        thread.join()


@contextmanager
def recorded(service: Service) -> Iterator[list[Generation]]:
    """The texts as the engine has recorded them, while this is in force."""
    texts: list[Generation] = []

    def listener(_: Any, said: Any) -> None:
        if isinstance(said, Generation):
            texts.append(said)

    service.listeners.append(listener)
    try:
        yield texts
    finally:
        service.listeners.remove(listener)


def events(lines: Iterator[str]) -> list[Any]:
    """What a stream of server-sent events says: objects, and the words DONE and ping."""
    found: list[Any] = []
    for line in lines:
        if line.startswith(":"):
            found.append("ping")
        elif line == "data: [DONE]":
            found.append("DONE")
        elif line:
            found.append(json.loads(line.removeprefix("data: ")))
    return found


def streamed(client: Any, path: str, **body: object) -> list[Any]:
    """The events that a client of httpx is told."""
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.iter_lines())


def text_of(chunks: list[Any]) -> str:
    """Of a stream of completions, the text of all choices."""
    return "".join(choice["text"] for one in chunks[:-1] for choice in one["choices"])


def until(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
