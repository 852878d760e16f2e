"""Answers on their way: whole ones, and streams of server-sent events.

    data: {...}     a chunk; the first of a chat says the role, the last of each choice why it ended
    : ping          a comment in a long silence, so that nothing in between gives up
    data: [DONE]    the end; without it the stream has broken off

An error behind the headers is an event of its own, `data: {"error": ...}`, and ends the stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pearl.engine import Generation
from pearl.server.api.answers import Answer
from pearl.server.errors import APIError, from_engine
from pearl.server.life import beside
from pearl.server.texts import PING, Feed

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE, ALIVE = b"data: [DONE]\n\n", b": ping\n\n"
Release = Callable[[Feed], None]


def event(body: dict[str, Any]) -> bytes:
    """In ASCII: there are readers that take U+2028 and the like for the end of a line."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def met(error: BaseException) -> APIError:
    """What a client is told of what has ended its texts."""
    if isinstance(error, TimeoutError):
        return APIError(504, "The request has taken too long.", "timeout", headers={"x-should-retry": "false"})
    return from_engine(error)


async def whole(request: Request, feed: Feed, answer: Answer, release: Release) -> Response:
    """The answer in one piece, or nothing if the client has gone: then its texts end within a pass."""
    reading = asyncio.create_task(_read(feed))
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=499)
        try:
            reading.result()
        except Exception as error:
            raise met(error) from None
        size = sum(len(one.handle.prompt) + one.tokens for one in feed.texts)
        return await beside(size, lambda: JSONResponse(answer.whole(feed.texts)))
    finally:
        reading.cancel()
        leaving.cancel()
        release(feed)


async def _read(feed: Feed) -> None:
    async with aclosing(feed.news()) as news:
        async for _, said in news:
            if isinstance(said, Generation) and said.error:
                raise said.error


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def stream(feed: Feed, answer: Answer, release: Release) -> StreamingResponse:
    return StreamingResponse(_events(feed, answer, release), media_type="text/event-stream", headers=HEADERS)


async def _events(feed: Feed, answer: Answer, release: Release) -> AsyncIterator[bytes]:
    """A client that goes cancels this, and with it the texts."""
    try:
        for text in feed.texts:
            if opening := answer.opening(text):
                yield event(answer.chunk([opening], feed.texts))
        growing = {text: text.handle.new_stream() for text in feed.texts}
        async with aclosing(feed.news(pings=True)) as news:
            async for one in news:
                if one is PING:
                    yield ALIVE
                    continue
                text, said = one
                ended = isinstance(said, Generation)
                if ended and said.error:
                    raise said.error
                piece = growing[text].end(said.text) if ended else growing[text].add(said)
                choices = [answer.delta(text, piece, [] if ended else said), answer.closing(text) if ended else None]
                for choice in filter(None, choices):
                    yield event(answer.chunk([choice], feed.texts))
        if answer.with_usage:
            yield event(answer.last(feed.texts))
        yield DONE
    except Exception as error:
        yield event(met(error).body)
    finally:
        release(feed)
