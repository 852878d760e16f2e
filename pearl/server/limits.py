"""What is checked of a request before anybody reads its body: its key, its size, its coding, and that it
comes at all.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pearl.config.server_config import ServerConfig
from pearl.server.errors import APIError, unexpected
from pearl.server.metrics import Metrics

BODY_S = 30.0  # between two pieces of a body
GUARDED = "/v1/"


class Limits:
    """Around the whole application."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics):
        self._app, self._metrics = app, metrics
        self._key = config.key.encode() if config.key else None
        self._most = round(config.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:200] or secrets.token_hex(8).encode()
        began = False

        async def send_with_id(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if message["status"] >= 400:
                    self._metrics.refused(message["status"])
            await send(message)

        try:
            self._check_key(scope, headers)
            self._check_length(headers)
            _check_coding(headers)
            await self._app(scope, self._limited(receive), send_with_id)
        except APIError as error:
            if began:
                raise
            await error.response(scope, receive, send_with_id)
        except Exception as error:
            if not began:
                await unexpected(error).response(scope, receive, send_with_id)
            raise  # to the server's log

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._key is None or not scope["path"].startswith(GUARDED) or scope["method"] == "OPTIONS":
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if not (hmac.compare_digest(given.strip(), self._key) and kind.lower() == b"bearer"):
            raise APIError(
                401, "The API key is missing or wrong.", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._most:
            raise self._too_large

    @property
    def _too_large(self) -> APIError:
        return APIError(413, f"The body is larger than {self._most} bytes.", "request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message: Any = await asyncio.wait_for(receive(), BODY_S)
            except TimeoutError:
                raise APIError(408, "The body did not come.", "timeout", headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._most:
                raise self._too_large
            return message

        return limited


def _check_coding(headers: dict[bytes, bytes]) -> None:
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip()
    if coding.lower() not in ("", "identity"):
        message = f"The body must come as it is, not as {coding[:50]}."
        raise APIError(415, message, headers={"Accept-Encoding": "identity"})
