"""The texts of one request, as the event loop has them: what the engine's thread says of each arrives in a queue.

Nothing here waits for a pass, and nothing keeps the engine waiting: a reader that is slow, or gone, finds less or
nothing in the queue, whose length no text can exceed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from pearl.core.records import Pass
from pearl.engine import Generation, GenerationHandle
from pearl.engine.handle import Said

PING_S = 15.0  # of silence, after which a stream says that it is alive
PING = object()


class Text:
    """One text. Times in seconds on the clock of `time.perf_counter`, which the target's is too."""

    def __init__(self, index: int, handle: GenerationHandle, arrived: float):
        """`index`: of its choice in the answer."""
        self.index, self.handle, self.arrived = index, handle, arrived
        self.heard = 0  # passes that were said
        self.tokens = self.told = 0  # heard, and read by whoever reads the feed
        self.first: float | None = None  # when its first tokens came,
        self.last = self.before = arrived  # and its last, and those before them
        self.ended: Generation | None = None
        self.ended_s = arrived

    @property
    def latest(self) -> Pass | None:
        """The pass that was said last."""
        state = self.handle.request.sequence
        return state.passes[self.heard - 1] if state and 0 < self.heard <= len(state.passes) else None

    @property
    def placed(self) -> float | None:
        """When it was given a place."""
        state = self.handle.request.sequence
        return state.placed if state else None

    def note(self, said: Said, now: float) -> None:
        if isinstance(said, list):
            self.heard += 1
            self.tokens += len(said)
            self.first, self.before, self.last = self.first or now, self.last, now
        elif isinstance(said, Generation):
            self.ended, self.ended_s = said, now


Hear = Callable[[Text, Said], None]


class Feed:
    """A `Sink` for the texts of one request. To be made in the event loop; `put` alone is the engine's thread's."""

    def __init__(self, hear: Hear, deadline_s: float):
        """`hear` is told whatever is said, in the loop, whether or not anybody reads here. `deadline_s`: from now on;
        behind it the texts end, and the reader meets `TimeoutError`."""
        self._loop, self._hear = asyncio.get_running_loop(), hear
        self.texts: list[Text] = []
        self._by_handle: dict[GenerationHandle, Text] = {}
        self._news: asyncio.Queue[Any] = asyncio.Queue()
        self._quiet_since = self._loop.time()
        self._pinging: asyncio.TimerHandle | None = None
        self._deadline = self._loop.call_later(deadline_s, self.fail, TimeoutError())

    def add(self, text: Text) -> None:
        self.texts.append(text)
        self._by_handle[text.handle] = text

    def put(self, news: tuple[GenerationHandle, Said], /) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take, *news)
        except RuntimeError:  # the loop is closed: nobody listens any more
            news[0].abort()

    def _take(self, handle: GenerationHandle, said: Said) -> None:
        if not (text := self._by_handle.get(handle)):
            return  # it was refused: whoever asked has met the reason
        text.note(said, time.perf_counter())
        self._hear(text, said)
        self._quiet_since = self._loop.time()
        self._news.put_nowait((text, said))

    async def news(self, pings: bool = False) -> AsyncGenerator[Any, None]:
        """(text, what is said of it) until all are over; `pings`: and `PING` in long silences. Raises what has kept
        them from being written."""
        left = len(self.texts)
        if pings:
            self._pinging = self._loop.call_later(PING_S, self._ping)
        while left:
            one = await self._news.get()
            if isinstance(one, BaseException):
                raise one
            if one is not PING:
                said = one[1]
                if isinstance(said, BaseException):
                    raise said
                if isinstance(said, list):
                    one[0].told += len(said)
                left -= isinstance(said, Generation)
            yield one

    def _ping(self) -> None:
        if self._loop.time() - self._quiet_since >= 0.9 * PING_S:
            self._news.put_nowait(PING)
        self._pinging = self._loop.call_later(PING_S, self._ping)

    def fail(self, error: BaseException) -> None:
        """Ends the texts, and tells the reader why."""
        self.abort()
        self._news.put_nowait(error)

    def abort(self) -> None:
        for text in self.texts:
            text.handle.abort()

    def close(self) -> None:
        """Nobody reads any more. Texts that are not over end within a pass."""
        self._deadline.cancel()
        if self._pinging:
            self._pinging.cancel()
        self.abort()
