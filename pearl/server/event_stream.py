"""Those who watch an engine over HTTP: a page has one stream of events, of which it may miss some.

The engine is watched only while there is somebody. It never waits: what it says goes into a row of limited length, and
from there into one of each reader; where a row is full, the event is dropped and counted, and the reader is told how
many. A reader learns the words of its own texts alone, those with its key in their label; of all others it learns when
passes were. One whose connection broke finds its texts again if it comes back soon.

A stream begins with `hello`: which server it is (numbers of sequences are one server's), its time, and whether its
drafter is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from pearl.core.messages import Nodes
from pearl.engine import Engine
from pearl.roles.pass_recorder import PassTimes
from pearl.roles.sequence import SequenceState
from pearl.roles.verification import PassRows, PassWalk
from pearl.server import seen, streaming
from pearl.server.life import LOOK_S, is_degraded
from pearl.server.seen import Event, Seen, Teller
from pearl.wire.reconnecting_channel import DrafterEvent

RAW, READER = 2000, 500  # events that may wait for the loop, and for a reader
ALIVE_S = 10.0  # of silence, until a reader is told that all is well
LINGER_S = 10.0  # that an engine is watched on after its last reader
_log = logging.getLogger(__name__)


class Served(Protocol):
    """What is asked of the service."""

    stopping: asyncio.Event
    events: Sequence[DrafterEvent]

    @property
    def engine(self) -> Engine: ...


class Reader:
    """One stream of events."""

    def __init__(self, key: str):
        self._key = f"{key}/" if key else ""
        self.waiting: deque[Event] = deque()
        self.news = asyncio.Event()
        self.dropped = 0

    def owns(self, label: str) -> bool:
        return bool(self._key) and label.startswith(self._key)

    def put(self, event: Event) -> None:
        if len(self.waiting) >= READER:
            self.dropped += 1
            return
        if self.dropped:
            self.waiting.append({"e": "dropped", "n": self.dropped})
            self.dropped = 0
        self.waiting.append(event)
        self.news.set()


class EventStream:
    """A `Watcher` of one service's engine. To be made and used in the event loop, but for what a watcher is told."""

    def __init__(self, service: Served):
        self._service = service
        self._readers: set[Reader] = set()
        self._raw: deque[Seen] = deque()
        self._due = False  # the loop has been told to look into the row
        self._lost = 0  # that found the row full
        self._teller: Teller | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking: asyncio.Task[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._run = secrets.token_hex(8)
        self.zero = time.perf_counter()
        self.told = 0  # events

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """Server-sent events, until the reader goes or the server stops. `key`: that its texts have in their labels."""
        reader = Reader(key)
        self._enter(reader)
        try:
            degraded = is_degraded(self._service.events)
            yield b": welcome\n\n" + streaming.event(
                {"e": "hello", "run": self._run, "t": self.now(), "degraded": degraded}
            )
            while not self._service.stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.news.wait(), ALIVE_S)
                reader.news.clear()
                if not reader.waiting:
                    yield b": well\n\n"
                while reader.waiting:
                    yield streaming.event(reader.waiting.popleft())
        finally:
            self._leave(reader)

    def now(self) -> float:
        """Milliseconds."""
        return round((time.perf_counter() - self.zero) * 1e3, 2)

    def _enter(self, reader: Reader) -> None:
        self._readers.add(reader)
        if self._lingering:
            self._lingering.cancel()
            self._lingering = None
        engine = self._service.engine
        if not self._looking:
            self._loop = asyncio.get_running_loop()
            self._teller = self._teller or Teller(self.zero, lambda ids: engine.tokenizer.decode(ids))
            self._looking = asyncio.create_task(self._look(len(self._service.events)))
        engine.watch(self)  # when all is there that hears of it

    def _leave(self, reader: Reader) -> None:
        self._readers.discard(reader)
        if not self._readers:
            linger = 0.0 if self._service.stopping.is_set() else LINGER_S
            self._lingering = asyncio.get_running_loop().call_later(linger, self._end)

    def _end(self) -> None:
        """Nobody has come back."""
        with contextlib.suppress(Exception):  # the engine may be gone
            self._service.engine.watch(None)
        if self._looking:
            self._looking.cancel()
            self._looking = None
        if self._teller:
            self._teller.forget()
        self._raw.clear()

    async def _look(self, known: int) -> None:
        """Tells what becomes of the drafter behind so many events, also while no text is under way; wakes the readers
        when all is over."""
        stopping = self._service.stopping
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), LOOK_S)
            events = self._service.events
            for count, one in enumerate(events[known:], known + 1):
                told = {"e": "drafter", "kind": one.kind, "what": one.what, "t": self.now()}
                told["degraded"] = is_degraded(events[:count])
                self._spread("", told, told)
            known = len(events)
        for reader in self._readers:
            reader.news.set()

    def _spread(self, label: str, mine: Event, others: Event) -> None:
        for reader in self._readers:
            reader.put(mine if reader.owns(label) else others)
        self.told += 1

    def _drain(self) -> None:
        self._due = False
        if self._lost:
            lost, self._lost = self._lost, 0
            for reader in self._readers:
                reader.dropped += lost
        while self._raw and self._teller:
            try:
                self._spread(*self._teller.tell(self._raw.popleft()))
            except Exception:  # what is shown of a text must not end anything
                _log.exception("an event could not be told")

    # As the engine's thread sees it

    def began(self, sequence: SequenceState) -> None:
        self._note(seen.began, sequence)

    def passed(self, sequence: SequenceState, rows: PassRows, walked: PassWalk, times: PassTimes) -> None:
        self._note(seen.passed, sequence, rows, walked, times)

    def drafted(self, nodes: Nodes, at: float) -> None:
        self._note(seen.drafted, nodes, at)

    def _note(self, copy: Any, *facts: Any) -> None:
        if len(self._raw) >= RAW:
            self._lost += 1
            return
        try:
            self._raw.append(copy(*facts))
            if not self._due and self._loop:
                self._due = True
                self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop is closed
            return
        except Exception:
            _log.exception("what a pass did could not be noted")
