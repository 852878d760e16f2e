"""The Python interface: an engine writes texts with a target and its drafter.

with Engine.from_pretrained(target="Qwen/Qwen2.5-7B-Instruct", draft="Qwen/Qwen2.5-0.5B-Instruct") as engine:
    print(engine.generate("def fib(n):", SamplingParams(max_new_tokens=64)).text)

Refuses to know: processes, ranks and devices, which are those of its `Runtime` (`pearl.parallel`).
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Any, TypedDict, Unpack, overload

from pearl import options
from pearl.config.engine_config import DRAFT, EngineConfig
from pearl.core import records
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Decode, Stopper, TextStream
from pearl.errors import UsageError
from pearl.machine import memory
from pearl.parallel.launch import launch, refuse_alone
from pearl.parallel.runtime import Runtime
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.wire.channel import Channel
from pearl.wire.reconnecting_channel import DrafterEvent

Prompt = str | Sequence[int] | Sequence[dict]
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class Generation:
    """One text. `tokens` are the new ones, with the end-of-sequence token if it came; `stats` is its record."""

    tokens: list[int] = field(repr=False)
    text: str
    finish_reason: str  # "eos", "stop" or "length"
    stats: records.GenerationStats = field(repr=False)


@dataclass(eq=False)
class GenerationRequest:
    """A text to be written, one of several. `after`: one that the prompt begins with, so that what was read of its text
    need not be read again."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    after: GenerationRequest | None = None
    text: SequenceState | None = field(default=None, repr=False)  # what became of it


class Settings(TypedDict, total=False):
    """Of one call."""

    mode: str | Schedule | None  # in place of the engine's own
    gamma: int | str | None  # the same; may be given without a mode
    continues: bool  # the prompt begins with the last text, which both models need not read again
    batch_size: int | None  # texts side by side at most, the others wait; None: as many as the engine has places for


Written = tuple[GenerationRequest, list[int] | Generation]


class Engine:
    """Make one with `from_pretrained`. It has one run at a time, and is not for several threads at once."""

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

        `target`, `draft`: hub ids, folders, GGUF files. Without either it is the embedded target and its draft model; a
        target alone is drafted for by n-grams, and a draft alone drafts for the embedded target.
        `mode`, `gamma`: what `generate` does unless told otherwise; a `Schedule` holds every setting. `processes`: 1
        keeps everything in this one (modes `ar` and `sd`); by default as many as the mode needs. `options`: the other
        fields of `EngineConfig`.

        Under `accelerate launch` or `torchrun` with two processes, rank 1 becomes the drafter in here and leaves the
        program when the target closes. Raises `UsageError`.
        """
        given = {"target": target, "draft": DRAFT if target is None and draft is None else draft}
        config = EngineConfig(**{k: v for k, v in given.items() if v is not None}, **options)  # type: ignore[arg-type]
        return cls(launch(config, _schedule(mode, gamma), processes))

    def __init__(self, runtime: Runtime):
        """Closes `runtime` when it is closed."""
        self.runtime, self.model, self.tokenizer = runtime, runtime.model, runtime.tokenizer
        self._closed = False
        self._run: _Run | None = None  # the texts under way
        self._last: GenerationRequest | None = None  # that was begun
        atexit.register(self.close)

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

        `settings`: those of `Settings`. Raises `UsageError`, for an empty or too long prompt among others.
        """
        jobs, run = self._begin(prompt, params, **settings)
        made = dict(run)
        texts = [text for job in jobs if isinstance(text := made[job], Generation)]
        return texts if _several(prompt) else texts[0]

    def stream(
        self, prompt: Prompt | Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> Iterator[Any]:
        """The same tokens, one by one, as they are committed. What is yielded is never taken back. Of a list of
        prompts: (number of the prompt, token).

        An engine has one run at a time: another one ends a stream that was not read to its end, and reading on in that
        raises `UsageError`.
        """
        jobs, run = self._begin(prompt, params, **settings)
        tokens = ((job, token) for job, said in run if not isinstance(said, Generation) for token in said)
        return _numbered(jobs, tokens) if _several(prompt) else (token for _, token in tokens)

    def stream_text(
        self, prompt: Prompt | Sequence[Prompt], params: Params = None, **settings: Unpack[Settings]
    ) -> Iterator[Any]:
        """The same text in pieces, as it is written: whole characters, and nothing that may yet become a stop string.
        Joined they are the text that `generate` returns. Of a list of prompts: (number of the prompt, piece)."""
        jobs, run = self._begin(prompt, params, **settings)
        growing = {job: TextStream(self.decode, job.params.stop, self._is_byte) for job in jobs}

        def pieces() -> Iterator[tuple[GenerationRequest, str]]:
            for job, said in run:
                text = growing[job]
                if piece := text.end(said.text) if isinstance(said, Generation) else text.add(said):
                    yield job, piece

        return _numbered(jobs, pieces()) if _several(prompt) else (piece for _, piece in pieces())

    def write(
        self,
        jobs: Iterable[GenerationRequest | None],
        *,
        mode: str | Schedule | None = None,
        gamma: int | str | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Written]:
        """Texts side by side: yields each request with the tokens that a pass has committed of it, and at last with all
        of it. A request is taken when there is a place for it; `jobs` yields None when there is none yet."""
        schedule = _schedule(mode or self.runtime.schedule, gamma)
        if self._closed:
            raise UsageError("This engine is closed: make another one.")
        self.runtime.config.check_mode(schedule.mode)
        if schedule.drafts and not self.runtime.target.channel:
            made_for = self.runtime.schedule.mode
            raise UsageError(f"This engine was made for {made_for} and has no drafter: make one for {schedule.mode}.")
        if self.runtime.processes == 1:
            refuse_alone(schedule)
        places = self.model.batch_slots if batch_size is None else batch_size
        if not 1 <= places <= self.model.batch_slots:
            raise UsageError(
                f"batch_size must be from 1 to the {self.model.batch_slots} texts that this engine has places for, not "
                f"{batch_size!r}: make one with more max_sequences."
            )
        if self._run:
            self._run.leave("Another run was begun on this engine, which has one at a time")
        self._run = _Run(self._write(jobs, schedule, places))
        return self._run

    def _write(
        self, jobs: Iterable[GenerationRequest | None], schedule: Schedule, places: int
    ) -> Generator[Written, None, None]:
        memory.reset_peak()
        sent: dict[GenerationRequest, float] = {}  # bytes on the wire, shared out among the texts under way

        def begun(job: GenerationRequest | None) -> SequenceRequest | None:
            request = self._request(job)
            if job:
                sent[job] = 0.0
            return request

        with self.runtime.target_for(schedule) as target:
            before = _bytes(target.channel)
            for text, committed in target.write(map(begun, jobs), schedule, places):
                self.runtime.check()
                job = text.request.user_data
                assert isinstance(job, GenerationRequest)
                job.text, now = text, _bytes(target.channel)
                for one in sent:
                    sent[one] += (now - before) / len(sent)
                before = now
                yield job, committed or _generation(text, places, round(sent.pop(job)))

    def _begin(
        self, prompt: Prompt | Sequence[Prompt], params: Params, continues: bool = False, **settings: Any
    ) -> tuple[list[GenerationRequest], Iterator[Written]]:
        for name in settings.keys() & {one.name for one in fields(SamplingParams)}:
            raise UsageError(f"{name} is a field of SamplingParams: give SamplingParams({name}=...) after the prompt.")
        options.refuse_unknown(settings, Settings.__annotations__, "Engine", {})
        jobs = self._jobs(prompt, params, continues)
        return jobs, self.write(jobs, **settings)

    def _jobs(self, prompt: Prompt | Sequence[Prompt], params: Params, continues: bool) -> list[GenerationRequest]:
        """One for each prompt, all of them checked."""
        prompts: Sequence[Any] = prompt if _several(prompt) else [prompt]  # type: ignore[assignment]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts and {len(params)} params: give one for each, or one.")
        if continues and len(prompts) > 1:
            raise UsageError("Only one text can continue the last one: give each a GenerationRequest, and write them.")
        jobs = [GenerationRequest(self.encode(prompt), own) for prompt, own in zip(prompts, params, strict=True)]
        for job in jobs:
            self.runtime.checked.check_prompt(job.prompt, job.params.max_new_tokens)  # type: ignore[arg-type]
        if continues:
            jobs[0].after = self._last
        self._last = jobs[-1]
        return jobs

    def _request(self, job: GenerationRequest | None) -> SequenceRequest | None:
        if job is None:
            return None
        prompt = self.encode(job.prompt)
        self.runtime.checked.check_prompt(prompt, job.params.max_new_tokens)
        stopper = Stopper(job.params, self.runtime.eos, _decoder(self.tokenizer))
        after, job.after = job.after, None  # once it is known what may be kept, a talk keeps only its last turn
        return SequenceRequest(prompt, job.params, stopper, after.text if after else None, job)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as `generate` reads it. Raises `UsageError`."""
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"The prompt holds half a character at {error.start}: it is no text.") from None
            return list(self.tokenizer(prompt).input_ids)
        if not isinstance(prompt, list | tuple):
            raise UsageError(f"The prompt must be text, token ids or messages, not {type(prompt).__name__}.")
        if prompt and isinstance(prompt[0], dict):
            if not self.tokenizer.chat_template:
                raise UsageError("This tokenizer has no chat template: give the prompt as text.")
            if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in prompt):
                raise UsageError("Every message must be a mapping with the texts role and content.")
            try:
                turns: Any = prompt
                text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program, and says in its own way what it does not take
                raise UsageError(f"The chat template does not take these messages ({error}).") from error
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(prompt)  # type: ignore[arg-type]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return _decoder(self.tokenizer)(tokens)  # type: ignore[arg-type]

    def _is_byte(self, token: int) -> bool:
        """Whether it stands for one byte, as in tokenizers after SentencePiece."""
        return re.fullmatch("<0x[0-9A-F]{2}>", str(self.tokenizer.convert_ids_to_tokens(token))) is not None

    def top_two_gap(self, text: Sequence[int]) -> float:
        """The distance of the two best logits of what follows `text`: how near the target is to another choice."""
        self.model.forget()
        best = self.model.read(text, keep=1)[0].float().topk(2).values
        return float(best[0] - best[1])

    @property
    def description(self) -> str:
        """A few lines for a person: who runs where, and how the bits are kept equal."""
        return self.runtime.description

    @property
    def events(self) -> list[DrafterEvent]:
        """What has happened to the drafter's process, and when."""
        return self.runtime.events

    def close(self) -> None:
        """Ends the drafter's process and gives the cores back. Closing twice is harmless."""
        self._closed = True
        atexit.unregister(self.close)
        if self._run:
            self._run.leave("This engine is closed")
        self.runtime.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """What `write` returns: an iterator that says so when it is read on after the engine has left it."""

    def __init__(self, writing: Generator[Written, None, None]):
        self._writing, self._why = writing, ""

    def __iter__(self) -> Iterator[Written]:
        return self

    def __next__(self) -> Written:
        if self._why:
            raise UsageError(f"{self._why}, and this text had not come to its end: read a stream before the next call.")
        return next(self._writing)

    def leave(self, why: str) -> None:
        """Ends the texts that are under way, if any are."""
        if getgeneratorstate(self._writing) != GEN_CLOSED:
            self._writing.close()
            self._why = why


def _decoder(tokenizer: Any) -> Decode:
    """Not a method of the engine, which a text that is kept would then keep, models and all."""
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _generation(text: SequenceState, places: int, sent: int) -> Generation:
    """A text that is over. Raises what has ended it, if it was no end of a text."""
    stopper = text.stopper
    if text.error:
        raise text.error
    assert stopper.finish, "a result before the end"
    stats = records.GenerationStats(
        mode=text.schedule.mode,
        prompt_tokens=len(text.request.prompt),
        tokens=tuple(stopper.tokens),
        text=stopper.text,
        finish=stopper.finish,
        passes=tuple(text.passes),
        drafter=text.draft_stats,
        bytes_on_wire=sent,
        peak_memory=memory.peak() + (text.draft_stats.memory if text.draft_stats else 0),
        places=places,
        began_s=text.placed,
        ended_s=text.ended,
    )
    return Generation(list(stopper.tokens), stats.text, stopper.finish, stats)


def _several(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is a list of prompts; one prompt is a text, or holds numbers or messages."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], str | list | tuple)


def _numbered(jobs: Sequence[GenerationRequest], said: Iterable[tuple[GenerationRequest, Any]]) -> Iterator[Any]:
    numbers = {job: number for number, job in enumerate(jobs)}
    return ((numbers[job], one) for job, one in said)


def _schedule(mode: str | Schedule, gamma: int | str | None) -> Schedule:
    """`gamma` None: the mode's own."""
    if not isinstance(mode, Schedule):
        return Schedule.of(mode, gamma)
    if gamma is None:
        return mode
    return Schedule.of(mode.mode, gamma, mode.draft_batch or None, mode.max_verify_tokens, mode.max_draft_tokens)


def _bytes(channel: Channel | None) -> int:
    return channel.bytes_sent + channel.bytes_received if channel else 0
