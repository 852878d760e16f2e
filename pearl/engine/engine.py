"""An engine writes texts with a target and its drafter, for any number of threads.

with Engine.from_pretrained(target="Qwen/Qwen2.5-7B-Instruct", draft="Qwen/Qwen2.5-0.5B-Instruct") as engine:
    print(engine.generate("def fib(n):", SamplingParams(max_new_tokens=64)).text)

Everything is made of `submit`: requests go to the engine's thread (`pearl.engine.worker`), and come back as handles.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from queue import SimpleQueue
from typing import Any, TypeVar, Unpack, overload

from pearl.config.engine_config import DRAFT, EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.engine.defaults import Defaults
from pearl.engine.generation import Generation, GenerationRequest, Prompt, Written, gathered
from pearl.engine.handle import GenerationHandle, Reading, RunKey, Said, Sink
from pearl.engine.prompts import ChatTemplate, PromptEncoder, are_several
from pearl.engine.requests import Params, RequestBuilder, Settings, as_schedule, refuse_schedule_names
from pearl.engine.worker import Worker
from pearl.errors import EngineClosedError, UsageError
from pearl.parallel.launch import launch
from pearl.parallel.runtime import Runtime
from pearl.roles.watcher import Watcher
from pearl.wire.reconnecting_channel import DrafterEvent

Result = TypeVar("Result")
News = SimpleQueue[tuple[GenerationHandle, Said]]
POLL_S = 0.002  # between two looks at an iterator that has no request yet, while none of its texts is under way
_NO_MORE = object()
_log = logging.getLogger("pearl")


class Engine:
    """Make one with `from_pretrained`. Its methods may be called from any thread, several at once."""

    @classmethod
    def from_pretrained(
        cls,
        target: str | None = None,
        draft: str | None = None,
        *,
        mode: str | Schedule = "pearl",
        gamma: int | str | None = None,
        processes: int | None = None,
        **options: object,
    ) -> Engine:
        """Loads a target and its drafter and starts the drafter's process if no launcher did.

        `target`, `draft`: hub ids, folders, GGUF files. Without either it is the embedded pair; a target alone is
        drafted for by the text itself, and a draft alone drafts for the embedded target.
        `mode`, `gamma`: what `generate` does unless told otherwise; a `Schedule` holds every setting. `processes`: 1
        keeps everything in this one (modes `ar` and `sd`); by default as many as the mode needs. `options`: the other
        fields of `EngineConfig`.

        Under `accelerate launch` or `torchrun` with two processes, rank 1 becomes the drafter in here and leaves the
        program when the target closes. Raises `UsageError`, `CheckpointError`, `WorkerLostError`.
        """
        refuse_schedule_names(options)
        given = {"target": target, "draft": DRAFT if target is None and draft is None else draft}
        config = EngineConfig(**{k: v for k, v in given.items() if v is not None}, **options)  # type: ignore[arg-type]
        return cls(launch(config, as_schedule(mode, gamma), processes))

    def __init__(self, runtime: Runtime):
        """Closes `runtime` when it is closed, or not used any more."""
        self._runtime, self._requests = runtime, RequestBuilder(runtime)
        self._worker = Worker(runtime, self._requests.decoder)
        if self.defaults.description:
            log = _log.warning if self.defaults.left_out and self.defaults.wanted else _log.info
            log("%s", self.defaults.description)
        self._last: GenerationRequest | None = None  # that was begun
        self._close = weakref.finalize(self, self._worker.close)  # at the end of the program at the latest

    # Whole texts

    @overload  # a str is a sequence of str too
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, params: SamplingParams | None = None, **settings: Unpack[Settings]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> list[Generation]: ...

    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> Generation | list[Generation]:
        """The whole text that follows `prompt`: text, token ids, or chat messages (dicts with "role" and "content").
        Of a list of prompts all of their texts, in the same order; `params` may then be a list too.

        `settings`: those of `Settings`. Raises `UsageError`, for an empty or too long prompt among others. Of several
        prompts one that is refused, or whose own logits processor fails, fails alone: its `Generation` has the finish
        reason "error" and the `error`. Where all fail, that is raised.
        """
        return self._generate(prompt, params, None, settings)

    def chat(
        self,
        messages: Sequence[Any],
        params: Params = None,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Unpack[Settings],
    ) -> Any:
        """The answer to a conversation: a `Generation`, or of a list of conversations a list of them.

        `tools` and the others: see `ChatTemplate`. For a stream, give what `encode` makes of them to `stream_text`.
        """
        template = ChatTemplate(
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._generate(messages, params, template, settings)

    def _generate(
        self, prompt: Any, params: Params, template: ChatTemplate | None, settings: Settings
    ) -> Generation | list[Generation]:
        asked = self.submit_all(prompt, params, template=template, **settings)
        try:
            texts = gathered([[handle.ended() for handle in samples] for samples in asked])
        finally:  # also where somebody has enough
            for handle in chain.from_iterable(asked):
                handle.abort()
        return texts if are_several(prompt) else texts[0]

    # Streams

    def stream(
        self, prompt: Prompt | Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> Iterator[Any]:
        """The same tokens, one by one, as they are committed. What is yielded is never taken back. Of a list of
        prompts: (number of the prompt, token).

        The text is written whether anybody reads or not; who closes the stream, or lets go of it, has aborted it. Of
        several prompts one that fails alone is raised at the end of the others.
        """
        numbers, reading = self._read(prompt, params, settings)
        tokens = ((one, token) for one, said in reading if isinstance(said, list) for token in said)
        if are_several(prompt):
            return ((numbers[one], token) for one, token in tokens)
        return (token for _, token in tokens)

    def stream_text(
        self, prompt: Prompt | Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> Iterator[Any]:
        """The same text in pieces, as it is written: whole characters, and nothing that may yet become a stop string.
        Joined they are the text that `generate` returns. Of a list of prompts: (number of the prompt, piece)."""
        numbers, reading = self._read(prompt, params, settings)
        growing = {one: one.new_stream() for one in numbers}

        def pieces() -> Iterator[tuple[GenerationHandle, str]]:
            for one, said in reading:
                if piece := growing[one].add(said) if isinstance(said, list) else growing[one].end(said.text):
                    yield one, piece

        if are_several(prompt):
            return ((numbers[one], piece) for one, piece in pieces())
        return (piece for _, piece in pieces())

    def _read(
        self, prompt: Prompt | Sequence[Prompt], params: Params, settings: Settings
    ) -> tuple[dict[GenerationHandle, int], Reading]:
        news: News = SimpleQueue()
        asked = self.submit_all(prompt, params, sink=news, **settings)
        handles = [handle for (handle,) in asked]
        return {handle: number for number, handle in enumerate(handles)}, Reading(handles, news)

    # Requests

    def submit(
        self,
        prompt: Prompt | GenerationRequest,
        params: SamplingParams | None = None,
        *,
        mode: str | Schedule | None = None,
        gamma: int | str | None = None,
        batch_size: int | None = None,
        sink: Sink | None = None,
        prediction: Sequence[int] | None = None,
    ) -> GenerationHandle:
        """Asks for a text and returns at once: a future of its `Generation`, which also yields its tokens or its text
        as they come, and can abort it. `prompt` may be a `GenerationRequest`, which has its own params.

        Texts of one mode share passes as far as there are places; others wait until those before them are over.
        `sink`: see `GenerationHandle`. `prediction`: token ids of a text that this one may be like, such as a file
        before an edit (OpenAI's `prediction`). Guesses are taken from it beside the target, unless `target_draft` is
        none or the mode has blocks; it changes no text. Raises `UsageError`, `EngineClosedError`.
        """
        if not isinstance(prompt, GenerationRequest):
            prompt = GenerationRequest(prompt, params or SamplingParams())
        elif params is not None:
            raise UsageError("A GenerationRequest has params of its own: give them there.")
        run = {"mode": mode, "gamma": gamma, "batch_size": batch_size}
        (handle,) = self.prepare([prompt], sink=sink, prediction=prediction, **run)
        self.begin(handle)
        return handle

    def prepare(
        self,
        requests: Sequence[GenerationRequest],
        *,
        sink: Sink | None = None,
        prediction: Sequence[int] | None = None,
        **settings: Any,
    ) -> list[GenerationHandle]:
        """What `submit` does before it asks: checks, and what takes long of many requests or of long ones. `begin` asks
        for the texts. `settings`: mode, gamma, batch_size. Raises `UsageError` for the first that can't be written."""
        run, guesses = self._requests.run_key(**settings), self._requests.prediction(prediction or ())
        handles = [self._requests.handle(request, run, self._wake, sink) for request in requests]
        for handle in handles:
            if handle.refused:
                raise handle.refused
            handle.prediction = guesses
        return handles

    def begin(self, handle: GenerationHandle) -> None:
        """Asks for a text that is prepared, and returns at once. Raises `EngineClosedError`."""
        self._worker.submit(handle)

    def submit_all(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        sink: Sink | None = None,
        template: ChatTemplate | None = None,
        **settings: Any,
    ) -> list[list[GenerationHandle]]:
        """For each prompt one of each sample; `settings` are those of `Settings`. One whose prompt was refused is over
        already, with the finish reason "error". Raises what is wrong with all of them."""
        after = self._last if settings.pop("continues", False) else None
        asked = self._requests.handles(prompt, params, after, self._wake, sink, template, settings)
        for handle in chain.from_iterable(asked):
            if not handle.refused:
                self._last = handle.request
                self._worker.submit(handle)
        return asked

    def abort(self, request: GenerationHandle) -> None:
        """Ends a text within a pass, and frees its place; see `GenerationHandle.abort`."""
        request.abort()

    def write(
        self,
        requests: Iterable[GenerationRequest | None],
        *,
        mode: str | Schedule | None = None,
        gamma: int | str | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Written]:
        """Texts side by side: yields each request with the tokens that a pass has committed of it, and at last with all
        of it. A list of requests is handed over at once. From any other iterable a request is taken when there is a
        place for it; it yields None when there is none yet. One that is refused fails alone, as in `generate`."""
        return self._write(requests, self._requests.run_key(mode, gamma, batch_size))

    def _write(self, requests: Iterable[GenerationRequest | None], run: RunKey) -> Iterator[Written]:
        queue, more = iter(requests), True
        news: News = SimpleQueue()
        live: set[GenerationHandle] = set()
        try:
            while more or live:
                while more and (isinstance(requests, list | tuple) or sum(one.lives for one in live) < run.batch_size):
                    request: Any = next(queue, _NO_MORE)
                    more = request is not _NO_MORE
                    if request is None or not more:
                        break
                    handle = self._requests.handle(request, run, self._wake, news)
                    live.add(handle)
                    if not handle.refused:
                        self._worker.submit(handle)
                if live:
                    handle, said = news.get()
                    if not isinstance(said, list):
                        live.discard(handle)
                    if isinstance(said, BaseException):
                        raise said
                    yield handle.request, said
                elif more:
                    time.sleep(POLL_S)
        finally:  # also where the caller stops listening
            for handle in live:
                handle.abort()

    def _wake(self) -> None:
        """A handle of a text under way keeps the engine, and with it the models."""
        self._worker.wake()

    # Tokens

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True, **template: Unpack[ChatTemplate]) -> list[int]:
        """The token ids of a prompt, as `generate` reads it; of messages as `chat` does. `add_special_tokens`: of a
        text, those that the tokenizer puts around it. Raises `UsageError`."""
        return self.prompts.encode(prompt, add_special_tokens, **template)

    @property
    def prompts(self) -> PromptEncoder:
        """What `encode` asks, with ways for an event loop."""
        return self._requests.prompts

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self._requests.decoder.plain(list(tokens))

    def top_two_gap(self, text: Sequence[int]) -> float:
        """The distance of the two best logits of what follows `text`: how near the target is to another choice. Waits
        for the texts under way. A conversation that goes on later may have to read its text again."""

        def gap() -> float:
            slot = self.model.max_sequences - 1
            self.model.forget(text, slot)
            best, second = self.model.read(text, 1, batch_slot=slot)[0].float().topk(2).values.tolist()
            return best - second

        return self.exclusively(gap)

    # The engine itself

    def exclusively(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs in the engine's thread, on its cores, alone, and may use the model."""
        return self._worker.call(work)

    @property
    def defaults(self) -> Defaults:
        """What the checkpoint asks for, and what of it is applied."""
        return self._requests.defaults

    @property
    def runtime(self) -> Runtime:
        """Its processes."""
        return self._runtime

    @property
    def modes(self) -> list[str]:
        """Those that it has the processes and the drafter for."""
        return [mode for mode in MODES if self._requests.has(mode)]

    @property
    def model(self) -> Any:
        """The target. To be used in `exclusively`."""
        return self._runtime.model

    @property
    def tokenizer(self) -> Any:
        return self._runtime.tokenizer

    @property
    def config(self) -> EngineConfig:
        return self._runtime.config

    @property
    def description(self) -> str:
        """A few lines for a person: who runs where, how the bits are kept equal, what the checkpoint asks for."""
        return "\n".join(filter(None, [self._runtime.description, self.defaults.description]))

    @property
    def events(self) -> list[DrafterEvent]:
        """What has happened to the drafter's process, and when. While a text is under way, up to its last pass."""
        try:
            return self._worker.call(lambda: self._runtime.events, now=True)
        except EngineClosedError:
            return self._runtime.events

    def watch(self, watcher: Watcher | None) -> None:
        """`watcher` is told of every pass from now on, in the engine's thread; None: nobody is."""
        self._runtime.target.watch(watcher)

    @property
    def closed(self) -> bool:
        """It writes nothing more: somebody has closed it, or its thread has failed."""
        return self._worker.closed

    @property
    def lost(self) -> bool:
        """A process that its target needs is gone: each text ends with a `WorkerLostError`."""
        return self._worker.lost

    @property
    def running(self) -> int:
        """Texts that were begun and are not over; others wait for a place."""
        return self._worker.running

    def close(self) -> None:
        """Ends its thread and the drafter's process. Texts that are not over end with an `EngineClosedError`. Closing
        twice is harmless."""
        self._close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
