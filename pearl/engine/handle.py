"""A text that was asked for, as its reader has it: the whole of it in the end, its tokens as they come.

Knows: how what is said in the engine's thread reaches a reader in another one. Refuses to know: how a text is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from pearl.core.schedule import Schedule
from pearl.core.stopping import TextStream
from pearl.engine.generation import Generation, GenerationRequest
from pearl.errors import PearlError

Said = list[int] | Generation | BaseException  # the tokens of a pass; at last the whole text, or why there is none


class RunKey(NamedTuple):
    """What texts have in common that may share passes."""

    schedule: Schedule
    batch_size: int


class Sink(Protocol):
    """Where what is said of a text goes."""

    def put(self, news: tuple[GenerationHandle, Said], /) -> None: ...


class GenerationHandle(Future[Generation]):
    """A `concurrent.futures.Future` of a text's `Generation`. Iterated, it yields the tokens as they are committed,
    each once. Its methods may be called from any thread."""

    def __init__(
        self,
        request: GenerationRequest,
        run: RunKey,
        wake: Callable[[], None],
        new_stream: Callable[[], TextStream],
        sink: Sink | None = None,
    ):
        """`wake` makes the engine look at what is wanted. `sink`: None: its own iterators."""
        super().__init__()
        self.request, self.run, self.new_stream = request, run, new_stream
        self.prompt: Sequence[int] = ()  # its token ids
        self.prediction: Sequence[int] = ()  # tokens of a text that it may be like
        self.params = request.params  # with no field left to defaults
        self.refused: PearlError | None = None
        self.failed: Generation | None = None  # what was written until this text, and no other, met an error
        self.wanted = True
        self._wake = wake
        self._own: SimpleQueue[tuple[GenerationHandle, Said]] = SimpleQueue()
        self._sink = sink or self._own

    @property
    def lives(self) -> bool:
        """It holds a place, or waits for one: a text that is over gives it back before its record is whole."""
        return not (self.request.sequence and self.request.sequence.stopper.finish)

    # As its reader sees it

    def abort(self) -> None:
        """Ends the text within a pass, and frees its place. What was written until then is its `Generation`, with the
        finish reason "abort"; nothing happens to a text that is over."""
        if self.wanted and not self.done():
            self.wanted = False
            self._wake()

    def cancel(self) -> bool:
        """Aborts the text. Returns whether it was still to be written. Its result is what was written."""
        was_wanted = self.wanted and not self.done()
        self.abort()
        return was_wanted

    def ended(self) -> Generation:
        """What was written, also where an error ended it that is this text's alone. Raises any other error."""
        self.exception()  # waits
        return self.failed or self.result()

    def __iter__(self) -> Iterator[int]:
        for tokens in self.passes():
            yield from tokens

    def passes(self) -> Iterator[list[int]]:
        """The tokens of each pass. Raises at the end what `result` raises."""
        while isinstance((news := self._own.get())[1], list):
            yield news[1]
        self._own.put(news)  # for whoever asks once more
        self.result()

    def stream_text(self) -> Iterator[str]:
        """The text in pieces, as it is written: whole characters, and nothing that may yet become a stop string."""
        text = self.new_stream()
        for tokens in self.passes():
            if piece := text.add(tokens):
                yield piece
        if piece := text.end(self.result().text):
            yield piece

    # As the engine's thread sees it

    def say(self, tokens: list[int]) -> None:
        """A pass has committed them."""
        self._sink.put((self, tokens))

    def finish(self, generation: Generation) -> None:
        self._wake = _nothing  # what is kept of a text keeps no engine
        self.set_result(generation)
        self._sink.put((self, generation))

    def fail(self, error: BaseException, failed: Generation | None = None) -> None:
        """`failed`: what was written, where the error is this text's alone."""
        self._wake, self.failed = _nothing, failed
        self.set_exception(error)
        self._sink.put((self, failed or error))


def _nothing() -> None:
    """Nobody is to be woken."""


class Reading:
    """An iterator of what is said of several texts, in the order in which it comes. Who lets go of it before they are
    over has aborted them. What one alone has met is raised at the end of the others."""

    def __init__(self, handles: Collection[GenerationHandle], news: SimpleQueue[tuple[GenerationHandle, Said]]):
        """`news`: the sink of these texts."""
        self._open, self._news = set(handles), news
        self._met: BaseException | None = None

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> tuple[GenerationHandle, list[int] | Generation]:
        if not self._open:
            met, self._met = self._met, None
            raise met or StopIteration
        handle, said = self._news.get()
        if not isinstance(said, list):
            self._open.discard(handle)
        if isinstance(said, BaseException):
            self.close()
            raise said
        if isinstance(said, Generation):
            self._met = self._met or said.error
        return handle, said

    def close(self) -> None:
        """Aborts the texts that are not over."""
        for handle in self._open:
            handle.abort()
        self._open = set()

    def __del__(self) -> None:
        self.close()
