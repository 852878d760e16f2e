"""The same engine for programs that run on asyncio: nothing here keeps the event loop waiting but loading.

async with AsyncEngine.from_pretrained() as engine:
    async for piece in engine.stream_text("def fib(n):"):
        print(piece, end="")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from itertools import chain
from typing import Any, Unpack

from pearl.core.params import SamplingParams
from pearl.engine.engine import Engine
from pearl.engine.generation import Generation, GenerationRequest, Prompt, gathered
from pearl.engine.handle import GenerationHandle, Said
from pearl.engine.prompts import ChatTemplate, are_several
from pearl.engine.requests import Params, Settings


class AsyncEngine:
    """An `Engine` whose texts are awaited. A task that is cancelled, and a stream that is left, abort their texts."""

    def __init__(self, engine: Engine):
        """`engine` may be used beside it, and is closed with it."""
        self.engine = engine

    @classmethod
    def from_pretrained(cls, target: str | None = None, draft: str | None = None, **options: Any) -> AsyncEngine:
        """As `Engine.from_pretrained`. Loads at once, and returns when the models are there."""
        return cls(Engine.from_pretrained(target, draft, **options))

    async def generate(
        self, prompt: Prompt | Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> Any:
        """As `Engine.generate`: a `Generation`, or of a list of prompts a list of them."""
        return await self._generate(prompt, params, None, settings)

    async def chat(self, messages: Sequence[Any], params: Params = None, **options: Any) -> Any:
        """As `Engine.chat`."""
        template: Any = {name: options.pop(name, None) for name in ChatTemplate.__annotations__}
        return await self._generate(messages, params, template, options)

    async def _generate(self, prompt: Any, params: Params, template: ChatTemplate | None, settings: Any) -> Any:
        asked = await _asked(lambda: self.engine.submit_all(prompt, params, template=template, **settings))
        try:
            texts = gathered([[await _ended(handle) for handle in samples] for samples in asked])
        finally:  # also where the task is cancelled
            for handle in chain.from_iterable(asked):
                handle.abort()
        return texts if are_several(prompt) else texts[0]

    async def stream(
        self, prompt: Prompt | GenerationRequest, params: SamplingParams | None = None, **settings: Any
    ) -> AsyncGenerator[int, None]:
        """The tokens of one text, as they are committed."""
        async with aclosing(self._passes(prompt, params, **settings)) as passes:
            async for _, said in passes:
                for token in said if isinstance(said, list) else ():
                    yield token

    async def stream_text(
        self, prompt: Prompt | GenerationRequest, params: SamplingParams | None = None, **settings: Any
    ) -> AsyncGenerator[str, None]:
        """The same text in pieces of whole characters."""
        text = None
        async with aclosing(self._passes(prompt, params, **settings)) as passes:
            async for handle, said in passes:
                text = text or handle.new_stream()
                if piece := text.add(said) if isinstance(said, list) else text.end(said.text):
                    yield piece

    async def _passes(
        self, prompt: Prompt | GenerationRequest, params: SamplingParams | None, **settings: Any
    ) -> AsyncGenerator[tuple[GenerationHandle, list[int] | Generation], None]:
        sink = _LoopSink()
        ((handle,),) = await _asked(lambda: [[self.engine.submit(prompt, params, sink=sink, **settings)]])
        try:
            while True:
                said = await sink.said.get()
                if isinstance(said, BaseException):
                    raise said
                yield handle, said
                if isinstance(said, Generation):
                    if said.error:
                        raise said.error
                    return
        finally:
            handle.abort()

    def abort(self, request: GenerationHandle) -> None:
        self.engine.abort(request)

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _asked(ask: Callable[[], list[list[GenerationHandle]]]) -> list[list[GenerationHandle]]:
    """Asks in another thread, as checks and tokens of a long prompt take a while. What nobody awaits is aborted."""
    asking = asyncio.ensure_future(asyncio.to_thread(ask))
    try:
        return await asyncio.shield(asking)
    except asyncio.CancelledError:
        asking.add_done_callback(_abort)
        raise


def _abort(asked: asyncio.Future[list[list[GenerationHandle]]]) -> None:
    if not asked.cancelled() and not asked.exception():
        for handle in chain.from_iterable(asked.result()):
            handle.abort()


async def _ended(handle: GenerationHandle) -> Generation:
    with suppress(Exception):  # it is the handle's
        await asyncio.wrap_future(handle)
    return handle.ended()


class _LoopSink:
    """Brings what the engine's thread says into the event loop that listens."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.said: asyncio.Queue[Said] = asyncio.Queue()

    def put(self, news: tuple[GenerationHandle, Said], /) -> None:
        try:
            self._loop.call_soon_threadsafe(self.said.put_nowait, news[1])
        except RuntimeError:  # the loop is closed: nobody listens any more
            news[0].abort()
