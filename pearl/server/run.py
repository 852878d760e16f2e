"""One process that listens: its socket, its signals, and what it says of itself.

It listens before the models are there, so that whoever asks meets 503 and no closed door. SIGTERM, or Ctrl-C, lets
running texts finish; a second one, or one while models are loaded, ends it at once, with all processes that it has
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import prometheus_client
import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pearl.config.server_config import KEY, ServerConfig
from pearl.engine import Engine
from pearl.server.app import make_app
from pearl.server.errors import bad
from pearl.server.life import Service

CLOSE_S = 5  # for connections to end after the last text
SILENT_S = 30  # for the header of a request to come, from its first byte on; of the first, from the connection on
KEEP_S = 75  # between two requests of one: longer than balancers keep theirs, so that they close first
_log = logging.getLogger("pearl.server")


class _Connection(H11Protocol):
    """One whose next request does not come in all that time is closed."""

    _silence: asyncio.TimerHandle | None = None  # while a header is awaited

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._silence = self.loop.call_later(SILENT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:
            self._end_silence()
        elif not self._silence:  # uvicorn waits no more for a connection that has said something
            self._silence = self.loop.call_later(SILENT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_silence()
        super().connection_lost(exc)

    def _end_silence(self) -> None:
        if self._silence:
            self._silence.cancel()
            self._silence = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in the shape of all errors."""
        body = bytes(bad(msg).response.body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        start = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")])
        parts = [self.conn.send(event) for event in (start, h11.Data(data=body), h11.EndOfMessage())]
        self.transport.write(b"".join(part for part in parts if part))
        self.transport.close()


class Server(uvicorn.Server):
    """Drains before it ends."""

    def __init__(self, service: Service):
        super().__init__(
            uvicorn.Config(
                make_app(service),
                loop="asyncio",
                http=_Connection,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level=logging.getLogger("pearl").getEffectiveLevel(),  # what it says of broken requests
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._told = False  # to end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told or not self._service.settled.is_set():  # while models are loaded there is no text to finish
            _end_at_once(sig)
        self._told = True
        _log.info("no new texts are taken; those under way (%d) will be finished", len(self._service.open))
        asyncio.get_running_loop().call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Lets running texts finish, and ends then. To be called in the loop."""
        if not self._draining:
            self._draining = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        await self._service.drain()
        self.should_exit = True


def _end_at_once(sig: int) -> None:
    """Nothing is waited for: a thread that loads models, or is in a pass, can't be stopped."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(128 + sig)


def serve(config: ServerConfig, model: str, make: Callable[[], Engine], sock: socket.socket) -> None:
    """Until it is told to end. Raises what has kept the engine from being made."""
    prometheus_client.disable_created_metrics()
    service = Service(make, config, model)
    server = Server(service)
    where = f"http://{_shown(config.host)}:{sock.getsockname()[1]}"

    async def run() -> None:
        telling = asyncio.create_task(_tell(server, service, where))
        try:
            await server.serve(sockets=[sock])
        finally:
            telling.cancel()

    asyncio.run(run())
    if service.failure:
        raise service.failure


async def _tell(server: Server, service: Service, where: str) -> None:
    await service.settled.wait()
    if service.failure:
        server.should_exit = True
        return
    print(f"{service.engine.description}\n\n{lines(service, where)}", flush=True)


def lines(service: Service, where: str) -> str:
    """What works as it is: a line for a shell, and one for Python. A key is never among it."""
    key, secret, first = "", '"none"', ""
    if service.config.key:
        key, secret = f' -H "Authorization: Bearer ${KEY}"', f'__import__("os").environ["{KEY}"]'
        first = f"These take the key from {KEY}, which their shell has to have:\n\n" if service.config.api_key else ""
    body = '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64, "temperature": 0}'
    path = "chat/completions"
    ask = 'chat.completions.create(messages=[{"role": "user", "content": "Why is the sky blue?"}], '
    shown = ".choices[0].message.content"
    if not service.engine.tokenizer.chat_template:
        body, path = '{"prompt": "The sky is", "max_tokens": 64, "temperature": 0}', "completions"
        ask, shown = 'completions.create(prompt="The sky is", ', ".choices[0].text"
    code = f'import openai; c = openai.OpenAI(base_url="{where}/v1", api_key={secret}); '
    code += f"print(c.{ask}max_tokens=64, temperature=0, model={service.model!r}){shown})"
    return (
        f"{service.model} is served at {where}\n\n{first}"
        f"  curl {where}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'\n\n"
        f"  python -c {shlex.quote(code)}\n"
    )


def _shown(host: str) -> str:
    """An address that a client can ask."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
