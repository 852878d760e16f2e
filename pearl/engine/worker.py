"""The engine's thread: it takes requests from all others, and writes their texts in runs of one schedule.

First come, first served. Texts of one schedule and batch size share the passes of a run, which they join and
leave between two passes. A text of another schedule, or a piece of work that needs the models for itself, waits for
the end of the run; whoever comes after it waits too, so that nobody is kept waiting for ever. Without work the thread
sleeps.

Knows: who waits for which text. Refuses to know: prompts and their checks, which are the callers'.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, TypeVar

from pearl.core.detokenizer import TextDecoder
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.engine.generation import unwritten, written
from pearl.engine.handle import GenerationHandle, RunKey
from pearl.engine.references import References
from pearl.errors import EngineClosedError, WorkerLostError
from pearl.machine import memory
from pearl.parallel.runtime import Runtime
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.roles.target import Target
from pearl.wire.channel import Channel

Result = TypeVar("Result")


@dataclass(eq=False)
class Call:
    """Something else to be done in the engine's thread. `now`: between two passes; else when no text is under way."""

    work: Callable[[], Any]
    now: bool
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        try:
            self.done.set_result(self.work())
        except BaseException as error:
            self.done.set_exception(error)


class Worker:
    """Its methods may be called from any thread, also from its own."""

    def __init__(self, runtime: Runtime, decoder: TextDecoder):
        self._runtime, self._decoder = runtime, decoder
        self._references = References(runtime.config.synthetic is not None)
        self._inbox: SimpleQueue[GenerationHandle | Call | None] = SimpleQueue()  # None: look at what is wanted
        self._waiting: deque[GenerationHandle | Call] = deque()
        self._under_way: dict[GenerationHandle, float] = {}  # with its share of the bytes on the wire
        self._closed, self._entry = False, threading.Lock()
        self.lost = False  # a process that the target needs is gone
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, name="pearl-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # while its drafter can still be told

    # From any thread

    def submit(self, work: GenerationHandle | Call) -> None:
        """Raises `EngineClosedError`."""
        with self._entry:  # else it could come after the last look into the inbox
            if self._closed:
                raise EngineClosedError("This engine is closed: make another one.")
            self._inbox.put(work)

    def wake(self) -> None:
        """Somebody does not want a text any more."""
        self._inbox.put(None)

    @property
    def closed(self) -> bool:
        """It writes nothing more."""
        return self._closed

    @property
    def running(self) -> int:
        """Texts that hold a place."""
        return sum(handle.lives for handle in list(self._under_way))

    def call(self, work: Callable[[], Result], now: bool = False) -> Result:
        """What `work` returns in the engine's thread: `now` between two passes, else while no text is under way."""
        if threading.current_thread() is self._thread:
            return work()
        call = Call(work, now)
        self.submit(call)
        result: Result = call.done.result()
        return result

    def close(self) -> None:
        """Ends the thread after the pass under way, and what belongs to the engine with it; all texts that are not over
        get an `EngineClosedError`."""
        with self._entry:
            self._closed = True
        self.wake()
        alive = self._thread.is_alive()  # it is not in a process that was forked off
        if threading.current_thread() is not self._thread and (alive or self._ended.done()):
            self._ended.result()
        atexit.unregister(self.close)

    # In the thread

    def _live(self) -> None:
        memory.reset_peak()  # what loading took is no text's
        error: BaseException = EngineClosedError("This engine was closed before the text was over.")
        try:
            with self._runtime.on_its_cores():
                while not self._closed:
                    self._take(wait=not self._waiting)
                    first = self._waiting[0] if self._waiting else None
                    if isinstance(first, Call):
                        self._waiting.popleft()
                        first.run()
                    elif first and not self._closed:
                        if self._references.missing(first):
                            self._write_references(first.run.batch_size)
                        else:
                            self._run(first.run)
                    del first  # a thread that sleeps keeps nobody's text
        except BaseException as broken:  # nobody may wait for a thread that is gone
            error = EngineClosedError(f"The engine's thread has failed ({type(broken).__name__}: {broken}).")
            error.__cause__ = broken
        with self._entry:
            self._closed = True
        self._take(wait=False)
        for work in (*self._under_way, *self._waiting):
            _fail(work, error)
        self._under_way.clear()
        self._waiting.clear()
        try:
            self._runtime.close()
            self._ended.set_result(None)
        except BaseException as broken:
            self._ended.set_exception(broken)

    def _take(self, wait: bool) -> None:
        """Takes what has come. `wait`: until something does."""
        while wait or not self._inbox.empty():
            work, wait = self._inbox.get(), False
            if isinstance(work, Call) and work.now:
                work.run()
            elif work:
                self._waiting.append(work)
            else:
                self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        """Those that wait; `Target` drops those that are under way."""
        for work in [one for one in self._waiting if isinstance(one, GenerationHandle) and not one.wanted]:
            self._waiting.remove(work)
            work.finish(unwritten(work.run.schedule.mode, len(work.prompt)))

    def _write_references(self, batch_size: int) -> None:
        """What the target alone writes of all that wait, if their drafter has to know it."""
        missing = [one for one in self._waiting if isinstance(one, GenerationHandle) and self._references.missing(one)]
        alone = Schedule.of("ar")
        requests = [self._sequence_request(one, None) for one in missing]
        try:
            with self._runtime.target_for(alone) as target, closing(target.write(requests, alone, batch_size)) as run:
                for text, committed in run:
                    if not committed and text.stopper.finish:
                        self._references.learn(text.request.user_data, text.stopper.tokens)
        except Exception as error:
            for handle in missing:
                self._waiting.remove(handle)
                handle.fail(error)

    def _run(self, key: RunKey) -> None:
        """Writes texts until none of this schedule is under way, or somebody else's turn has come."""
        (schedule, batch_size), first = key, self._waiting[0]
        try:
            with (
                self._runtime.target_for(schedule) as target,
                closing(target.write(self._requests(key, target), schedule, batch_size, self._goes_on)) as run,
            ):
                self._write(target, run, batch_size)
        except Exception as error:  # whatever it is, the engine goes on with the next run
            self.lost |= isinstance(error, WorkerLostError)
            for handle in list(self._under_way):
                text = handle.request.sequence
                if text and text.stopper.finish:  # it was whole, and waited for what its drafter says of it
                    self._end(handle, text, batch_size)
                else:
                    self._under_way.pop(handle)
                    handle.fail(error)
            if isinstance(first, GenerationHandle) and first in self._waiting:  # the models that it needs can't be had
                self._waiting.remove(first)
                first.fail(error)
        memory.reset_peak()  # that of the next run; not when it begins, for somebody waits for its first token then

    def _goes_on(self) -> bool:
        """Between two turns of the target, of which one may be a piece of a prompt."""
        self._take(wait=False)
        return not self._closed

    def _write(self, target: Target, run: Iterator[Any], batch_size: int) -> None:
        before = _bytes(target.channel)
        for text, committed in run:
            self._runtime.check()
            handle = text.request.user_data
            now = _bytes(target.channel)
            for one in self._under_way:
                self._under_way[one] += (now - before) / len(self._under_way)
            before, handle.request.sequence = now, text
            if committed:
                handle.say(committed)
            else:
                self._end(handle, text, batch_size)

    def _end(self, handle: GenerationHandle, text: SequenceState, batch_size: int) -> None:
        sent = self._under_way.pop(handle)
        try:
            made = written(text, batch_size, round(sent))
        except Exception as error:  # of a tokenizer that can't decode what was said
            handle.fail(error)
            return
        if not handle.run.schedule.drafts and text.stopper.finish:
            self._references.learn(handle, text.stopper.tokens)
        if text.error:
            handle.fail(text.error, replace(made, error=text.error))
        else:
            handle.finish(made)

    def _requests(self, key: RunKey, target: Target) -> Iterator[SequenceRequest | None]:
        """Those whose turn has come. None: nobody waits, but texts are under way."""
        while not self._closed:
            self._take(wait=False)
            first = self._waiting[0] if self._waiting else None
            if isinstance(first, GenerationHandle) and first.run == key and not self._references.missing(first):
                self._waiting.popleft()
                yield self._begin(first)
            elif first or target.idle:
                return
            else:
                yield None

    def _begin(self, handle: GenerationHandle) -> SequenceRequest:
        self._under_way[handle] = 0.0
        request = handle.request
        request.sequence = None  # it may have been asked for before
        after, request.after = request.after, None  # once it is known what may be kept, a talk keeps only its last turn
        return self._sequence_request(handle, after.sequence if after else None)

    def _sequence_request(self, handle: GenerationHandle, after: SequenceState | None) -> SequenceRequest:
        stopper = Stopper(handle.params, self._runtime.eos, self._decoder)
        reference = self._references.of(handle)
        return SequenceRequest(
            prompt=handle.prompt,
            params=handle.params,
            stopper=stopper,
            after=after,
            user_data=handle,
            wanted=lambda: handle.wanted,
            reference=reference,
            prediction=handle.prediction,
        )


def _fail(work: GenerationHandle | Call, error: BaseException) -> None:
    if isinstance(work, Call):
        work.done.set_exception(error)
    else:
        work.fail(error)


def _bytes(channel: Channel | None) -> int:
    return channel.bytes_sent + channel.bytes_received if channel else 0
