"""One engine and all who use it, from the loading of its models to the last text.

    loading    nothing can be written yet: 503
    ready      texts are written; a queue that is full: 429. *degraded* while the drafter is lost: slower, same texts
    draining   no new texts; those that run are finished, as far as the time allows
    failed     the engine is dead, or never came to life: 503

Lives in the event loop. What may take long is done beside it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pearl.config.server_config import ServerConfig
from pearl.core.params import SamplingParams
from pearl.engine import Engine, Generation, GenerationHandle, GenerationRequest
from pearl.engine.handle import Said
from pearl.errors import EngineClosedError
from pearl.server.errors import APIError, engine_dead
from pearl.server.metrics import Metrics
from pearl.server.texts import Feed, Hear, Text
from pearl.wire.reconnecting_channel import DrafterEvent

Result = TypeVar("Result")
LOADING, READY, DEGRADED, DRAINING, FAILED = "loading", "ready", "degraded", "draining", "failed"
SHORT = 2000  # bytes, characters or tokens that are worked at in the loop: about a millisecond
EACH = 250  # that a text counts for beside its own
LOOK_S = 0.3  # between two looks at the drafter
_log = logging.getLogger("pearl.server")


async def beside(size: float, work: Callable[[], Result]) -> Result:
    """What `work` returns: in a thread beside the loop if it takes its time. To change threads does too."""
    return work() if size <= SHORT else await asyncio.to_thread(work)


def is_degraded(events: Sequence[DrafterEvent]) -> bool:
    """Whether the target is alone: its drafter is lost, and not back."""
    kinds = [one.kind for one in events if one.kind in ("lost", "alone", "back")]
    return kinds[-1:] not in ([], ["back"])


def _is_dead(engine: Engine) -> bool:
    """Whether it writes nothing more."""
    return engine.closed or engine.lost


class Service:
    """To be made before the loop runs, and started in it."""

    def __init__(self, make: Callable[[], Engine], config: ServerConfig, model: str):
        """`make` loads an engine, which the service closes; `model`: its name to clients."""
        self._make, self.config, self.model = make, config, model
        self.state = LOADING
        self.events: Sequence[DrafterEvent] = ()  # of the drafter, as last seen
        self.created = int(time.time())
        self.metrics = Metrics(model, self)
        self.listeners: list[Hear] = []  # are told whatever is said of any text, in the loop: they must be quick
        self.open: set[Text] = set()  # asked for, and not over
        self._feeds: set[Feed] = set()
        self._engine: Engine | None = None
        self.failure: BaseException | None = None  # why the engine could not be made
        self.max_sequences = 0
        self.stopping = asyncio.Event()  # set when the server drains: endless streams end
        self.settled = asyncio.Event()  # set when the engine is there, or can't be had
        self._tasks: list[asyncio.Task[None]] = []
        self._mean_s = 1.0  # of the last texts, from place to end

    # Its life

    def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._load()))

    async def _load(self) -> None:
        try:
            self._engine = await asyncio.to_thread(self._make)
        except BaseException as error:
            self.state, self.failure = FAILED, error
            self.settled.set()
            return
        self.max_sequences = self._engine.model.max_sequences
        if self.state == LOADING:
            self.state = READY
        self.settled.set()
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _watch(self) -> None:
        """Keeps what is known of the drafter and the engine's thread fresh."""
        while True:
            engine = self.engine
            if _is_dead(engine) and self.state == READY:
                self.state = FAILED
            if not engine.closed:
                await asyncio.to_thread(self._look, engine)
            await asyncio.sleep(LOOK_S)

    def _look(self, engine: Engine) -> None:
        self.events = engine.events

    @property
    def degraded(self) -> bool:
        return is_degraded(self.events)

    @property
    def engine(self) -> Engine:
        """Raises `APIError` while there is none."""
        if not self._engine:
            raise APIError(503, "The models are not loaded yet.", "loading", headers={"Retry-After": "5"})
        return self._engine

    @property
    def status(self) -> str:
        if self.state != READY:
            return self.state
        if _is_dead(self.engine):
            return FAILED
        return DEGRADED if self.degraded else READY

    @property
    def healthy(self) -> bool:
        return self.status in (READY, DEGRADED)

    async def drain(self) -> None:
        """Lets running texts finish, as long as the config allows; those that have not finished end then."""
        if self.state != FAILED:
            self.state = DRAINING
        self.stopping.set()
        until = time.monotonic() + self.config.drain_timeout_s
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.open:
            _log.warning("%d texts were not finished in time and are ended", len(self.open))
        for feed in list(self._feeds):
            feed.fail(APIError(503, "The server is shutting down.", "shutting_down"))

    async def close(self) -> None:
        """Ends the engine, also one that is still being loaded."""
        self.stopping.set()
        await self.settled.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine:
            await asyncio.to_thread(self._engine.close)

    # Texts

    def check_open(self) -> None:
        """Raises `APIError` unless texts are taken."""
        if self.state == DRAINING:
            raise APIError(503, "The server is shutting down.", "shutting_down", headers={"Retry-After": "30"})
        engine = self.engine
        if self.state == FAILED or _is_dead(engine):
            raise engine_dead()

    def check_model(self, name: str | None) -> None:
        if name and name != self.model:
            raise APIError(
                404, f"The model {name[:200]!r} is not here: ask for {self.model!r}.", "model_not_found", "model"
            )

    def check_room(self, texts: int) -> None:
        """Raises `APIError` if the queue is full. A free place takes a request with any number of texts: one with more
        than the queue holds could else never be written."""
        if len(self.open) >= self.max_sequences and len(self.open) + texts > self.max_sequences + self.config.queue:
            waiting = len(self.open) - self.max_sequences
            retry = min(60, max(1, math.ceil((waiting + 1) * self._mean_s / self.max_sequences)))
            raise APIError(
                429,
                f"{waiting} texts wait for a place, where {self.config.queue} may, and this request brings {texts}: "
                f"try again in {retry} s.",
                "queue_full",
                headers={"Retry-After": str(retry)},
            )

    async def submit(
        self,
        asked: Sequence[tuple[list[int], SamplingParams]],
        mode: str | None = None,
        gamma: int | str | None = None,
        prediction: list[int] | None = None,
        arrived: float | None = None,
        label: str = "",
        size: float = math.inf,
    ) -> Feed:
        """Asks for a text of each prompt with its params; those who watch know them by `label`. `size`: of the request,
        see `SHORT`. Raises `APIError`, and `UsageError`."""
        self.check_open()
        self.check_room(len(asked))
        engine, feed = self.engine, Feed(self._hear, self.config.request_timeout_s)

        def prepared() -> list[GenerationHandle]:
            requests = [GenerationRequest(prompt, own, label=label) for prompt, own in asked]
            return engine.prepare(requests, mode=mode, gamma=gamma, sink=feed, prediction=prediction)

        try:
            handles = await beside(size + EACH * len(asked), prepared)
            self.check_open()
            self.check_room(len(asked))  # others may have come meanwhile
            for index, handle in enumerate(handles):
                engine.begin(handle)
                text = Text(index, handle, arrived or time.perf_counter())
                feed.add(text)
                self.open.add(text)
        except BaseException as error:
            feed.close()
            if isinstance(error, EngineClosedError):
                self.check_open()
            raise
        self._feeds.add(feed)
        return feed

    def release(self, feed: Feed) -> None:
        """Nobody reads these texts any more."""
        feed.close()
        self._feeds.discard(feed)

    def _hear(self, text: Text, said: Said) -> None:
        if not isinstance(said, list):
            self.open.discard(text)
            if isinstance(said, Generation) and said.stats.ended_s:
                self._mean_s += 0.1 * (said.stats.ended_s - said.stats.began_s - self._mean_s)
        self.metrics.hear(text, said)
        for listener in self.listeners:
            listener(text, said)

    # For the metrics

    @property
    def running(self) -> int:
        """Texts that have a place."""
        return self._engine.running if self._engine else 0

    @property
    def cache_share(self) -> float:
        """Of the tokens that all places can hold."""
        if not self._engine:
            return 0.0
        held = sum(len(one.handle.prompt) + one.tokens for one in self.open if one.tokens)
        return min(1.0, held / (self.max_sequences * self.max_length))

    # Tokens

    @property
    def max_length(self) -> int:
        return self.engine.runtime.checked.max_length

    async def encode(
        self, prompts: Sequence[Any], special: bool = True, at_most: int | None = None, **template: Any
    ) -> list[list[int]]:
        """The token ids of each, see `PromptEncoder.encode`; never waits in the loop for those of another request."""
        encoder = self.engine.prompts
        if not template and sum(EACH + len(one) for one in prompts) <= SHORT:
            found = [ids for one in prompts if (ids := encoder.at_once(one, special)) is not None]
            if len(found) == len(prompts):
                return found
        return await asyncio.to_thread(lambda: [encoder.encode(one, special, at_most, **template) for one in prompts])
