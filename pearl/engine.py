"""The Python interface: an engine holds a target, its drafter, and the processes they run in.

with Engine.from_pretrained(target="Qwen/Qwen2.5-7B-Instruct", draft="Qwen/Qwen2.5-0.5B-Instruct") as engine:
    print(engine.generate("def fib(n):", SamplingParams(max_new_tokens=64)).text)
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch

from pearl.checkpoints.placement import Placement
from pearl.checkpoints.preflight import Preflight, preflight
from pearl.checkpoints.targets import eos_ids, load_target
from pearl.config.engine_config import DRAFT, EngineConfig
from pearl.core import records, timeline
from pearl.core.sampling import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.errors import UsageError
from pearl.machine import cores, memory
from pearl.models.numerics_check import rows_check
from pearl.parallel.process import (
    DrafterProcess,
    TargetGone,
    World,
    draft_source,
    drafter_trace,
    follow_launcher,
    serve,
    shares,
)
from pearl.parallel.tensor_parallel import TensorParallelWorkers, deal, launched
from pearl.roles.drafter import Drafter
from pearl.roles.target import Request, Target, Text
from pearl.wire.channel import Channel, LocalChannel
from pearl.wire.reconnecting_channel import Event, ReconnectingChannel

Prompt = str | Sequence[int] | Sequence[dict]


@dataclass(frozen=True)
class Generation:
    """One text. `tokens` are the new ones, with the end-of-sequence token if it came; `stats` is its record."""

    tokens: list[int]
    text: str
    finish_reason: str  # "eos", "stop" or "length"
    stats: records.GenerationStats


@dataclass(eq=False)
class GenerationRequest:
    """A text to be written, one of several."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    after: GenerationRequest | None = (
        None  # which the prompt begins with: what was read of its text need not be read again
    )
    text: Text | None = None  # what became of it


class Engine:
    """Make one with `from_pretrained`. Not for several threads at once."""

    @classmethod
    def from_pretrained(
        cls,
        target: str | None = None,
        draft: str | None = None,
        *,
        mode: str | Schedule = "pearl",
        gamma: int | str = "auto",
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
        return cls(config, _schedule(mode, gamma), processes)

    def __init__(
        self,
        config: EngineConfig,
        schedule: Schedule | None = None,
        processes: int | None = None,
        checked: Preflight | None = None,
    ):
        """`checked`: the preflight of this config, if the caller has made it already."""
        self.config, self.schedule = config, schedule or Schedule.of("pearl")
        world = World.here(config.tensor_parallel_size)
        self.processes = count_processes(self.schedule, processes, world)
        checked = checked or preflight(config, world.roles, world.shards_here)
        two = self.processes == 2 or self.schedule.mode == "ar-all"
        self.target_cpus, self.draft_cpus = shares(config, two and not world.apart)
        if world.rank == 1:
            try:
                serve(config, self.draft_cpus)
            except TargetGone as gone:
                print(f"pearl: the drafter has lost its target ({gone}) and ends.", file=sys.stderr)
                raise SystemExit(1) from None
            raise SystemExit(0)
        dealt = deal(self.target_cpus, world.shards_here)  # neighbours on a machine are neighbours in rank
        self.target_cpus = dealt[world.shard % world.shards_here]
        if world.shard:
            launched(config, world, checked, self.target_cpus)
        if world.size == 2:
            follow_launcher("target")

        self._trace_path = Path(config.trace).absolute() if config.trace else None
        if self._trace_path:
            timeline.prepare(self._trace_path)
        self._allowed_cpus, self._threads = cores.available(), torch.get_num_threads()
        self._peer: DrafterProcess | None = None
        self._crew: TensorParallelWorkers | None = None
        self._lifeline: ReconnectingChannel | None = None
        self._closed = False
        self._run: Generator[Any, None, None] | None = None  # the texts under way
        self._last: GenerationRequest | None = None  # that was begun
        self._spread: Target | None = None  # over all devices, for ar-all on GPUs
        atexit.register(self.close)
        direct = checked.features_from(world.apart)
        try:
            if self.processes == 2:  # the drafter loads its model meanwhile
                self._peer = DrafterProcess(config, world, self.draft_cpus, direct)
            if world.shards > 1:
                self._crew = TensorParallelWorkers(config, world, dealt)
                self._crew.gather()
            cores.pin(self.target_cpus)
            torch.set_num_threads(len(self.target_cpus))
            self.tokenizer = checked.tokenizer
            self.model = load_target(checked, self._crew)
            self.model.features_stay = bool(self._peer and direct and not self._crew)
            self._checked = checked
            self._eos = eos_ids(self.model.model, self.tokenizer)
            trace = timeline.Trace("target", self._trace_path) if self._trace_path else timeline.OFF
            self._target = Target(self.model, self._open_channel(), trace=trace)
        except BaseException:
            self.close()
            raise

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **settings: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, **settings: Any
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mode: str | Schedule | None = None,
        gamma: int | str = "auto",
        continues: bool = False,
        batch_size: int | None = None,
    ) -> Generation | list[Generation]:
        """The whole text that follows `prompt`: text, token ids, or chat messages (dicts with "role" and "content").
        Of a list of prompts all of their texts, in the same order; `params` may then be a list too.

        `mode` and `gamma` replace the engine's own for this text. `continues`: the prompt begins with the last text,
        which both models need not read again. `batch_size`: texts side by side at most, else as many as the engine has
        places for (`max_sequences`); the others wait for a place. Raises `UsageError` for an empty or too long prompt.
        """
        several = _several(prompt)
        jobs = self._jobs(prompt if several else [prompt], params, continues)  # type: ignore[list-item, arg-type]
        done: dict[GenerationRequest, Generation] = {}
        for job, said in self.write(jobs, mode=mode, gamma=gamma, batch_size=batch_size):
            if isinstance(said, Generation):
                done[job] = said
        texts = [done[job] for job in jobs]
        return texts if several else texts[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mode: str | Schedule | None = None,
        gamma: int | str = "auto",
        continues: bool = False,
        batch_size: int | None = None,
    ) -> Iterator[int] | Iterator[tuple[int, int]]:
        """The same tokens, one by one, as they are committed. What is yielded is never taken back. Of a list of
        prompts: (number of the prompt, token)."""
        several = _several(prompt)
        jobs = self._jobs(prompt if several else [prompt], params, continues)  # type: ignore[list-item, arg-type]
        numbers = {job: number for number, job in enumerate(jobs)}
        run = self.write(jobs, mode=mode, gamma=gamma, batch_size=batch_size)

        def tokens() -> Iterator[Any]:
            for job, said in run:
                if not isinstance(said, Generation):
                    yield from ((numbers[job], token) for token in said) if several else said

        return tokens()

    def write(
        self,
        jobs: Iterable[GenerationRequest | None],
        *,
        mode: str | Schedule | None = None,
        gamma: int | str = "auto",
        batch_size: int | None = None,
    ) -> Iterator[tuple[GenerationRequest, list[int] | Generation]]:
        """Texts side by side: yields each job with the tokens that a pass has committed of it, and at last with all of
        it. A job is taken when there is a place for it; None says that there is none for now."""
        schedule = _schedule(mode, gamma) if mode else self.schedule
        if self._closed:
            raise UsageError("This engine is closed: make another one.")
        self.config.check_mode(schedule.mode)
        if schedule.drafts and self._target.channel is None:
            raise UsageError(
                f"This engine was made for {self.schedule.mode} and has no drafter: make one for {schedule.mode}."
            )
        if self.processes == 1:
            _refuse_alone(schedule)
        places = self.model.batch_slots if batch_size is None else batch_size
        if not 1 <= places <= self.model.batch_slots:
            raise UsageError(
                f"batch_size must be from 1 to the {self.model.batch_slots} texts that this engine has places for, not "
                f"{batch_size!r}: make one with more max_sequences."
            )
        if self._run:
            self._run.close()  # a stream that its reader left
        self._run = self._write(jobs, schedule, places)
        return self._run

    def _write(
        self, jobs: Iterable[GenerationRequest | None], schedule: Schedule, places: int
    ) -> Generator[tuple[GenerationRequest, list[int] | Generation], None, None]:
        memory.reset_peak()
        sent: dict[GenerationRequest, int] = {}  # bytes on the wire while it was written
        with self._everything() if schedule.mode == "ar-all" else contextlib.nullcontext(self._target) as target:
            before = _bytes(target.channel)
            for text, committed in target.write(map(self._request, jobs), schedule, places):
                job = text.request.tag
                assert isinstance(job, GenerationRequest)
                job.text = text
                if committed:
                    now = _bytes(target.channel)
                    sent[job], before = sent.get(job, 0) + now - before, now
                    yield job, committed
                else:
                    yield job, _generation(text, places, sent.get(job, 0))

    def _jobs(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, continues: bool
    ) -> list[GenerationRequest]:
        """One for each prompt, all of them checked."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts and {len(params)} params: give one for each, or one.")
        if continues and len(prompts) > 1:
            raise UsageError("Only one text can continue the last one: give each a Job, and write them.")
        jobs = [GenerationRequest(self.encode(prompt), own) for prompt, own in zip(prompts, params, strict=True)]
        for job in jobs:
            self._checked.check_prompt(job.prompt, job.params.max_new_tokens)  # type: ignore[arg-type]
        if continues and jobs:
            jobs[0].after = self._last
        if jobs:
            self._last = jobs[-1]
        return jobs

    def _request(self, job: GenerationRequest | None) -> Request | None:
        if job is None:
            return None
        prompt = self.encode(job.prompt)
        self._checked.check_prompt(prompt, job.params.max_new_tokens)
        stopper = Stopper(job.params, self._eos, _decoder(self.tokenizer))
        after, job.after = job.after, None  # once it is known what may be kept, a talk keeps only its last turn
        return Request(prompt, job.params, stopper, after.text if after else None, job)

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
                text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program, and says in its own way what it does not take
                raise UsageError(f"The chat template does not take these messages ({error}).") from error
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(prompt)  # type: ignore[arg-type]

    def decode(self, tokens: Sequence[int]) -> str:
        return _decoder(self.tokenizer)(tokens)

    def top_two_gap(self, text: Sequence[int]) -> float:
        """The distance of the two best logits of what follows `text`: how near the target is to another choice."""
        self.model.forget()
        best = self.model.read(text, keep=1)[0].float().topk(2).values
        return float(best[0] - best[1])

    @property
    def devices(self) -> dict[str, list[str]]:
        """Where the two models are."""
        places = {"target": self._checked.target_on}
        if self.processes == 2:
            places["drafter"] = self._checked.draft_on
        return {role: list(placed.devices) for role, placed in places.items()}

    @property
    def description(self) -> str:
        """A few lines for a person: who runs where, and how the bits are kept equal."""
        lines = []
        shares = {"target": (self.config.target, self.target_cpus), "drafter": (self.config.draft, self.draft_cpus)}
        for role, devices in self.devices.items():
            name, cpus = shares[role]
            where = (
                f"cpus {','.join(map(str, cpus))}, {len(cpus)} threads" if devices == ["cpu"] else ", ".join(devices)
            )
            if role == "target" and self.config.tensor_parallel_size > 1:
                where += f", as rank 0 of {self.config.tensor_parallel_size}"
            lines.append(f"{role}: {name} on {where}")
        if self._crew and self._crew.pids:
            lines[0] += f" (the others were started as processes {', '.join(map(str, self._crew.pids))})"
        if self.drafter_pid:
            lines[-1] += (
                f" (no launcher started two processes, so the drafter was started as process {self.drafter_pid})"
            )
        checks = (rows_check(self.model.rows), *(check for check in self.model.checks if check.what != "rows"))
        lines += [f"{check.what}: {check.found}" for check in checks]
        return "\n".join(lines)

    @property
    def draft_costs(self) -> tuple[float, ...]:
        """Seconds of a drafter forward by its rows, once a text has been drafted; empty without a draft model."""
        return self._target.draft_costs

    @property
    def drafter_pid(self) -> int | None:
        """Of the drafter's process if this engine has started it; None if a launcher did, or there is none."""
        return self._peer.pid if self._peer else None

    @property
    def events(self) -> list[Event]:
        """What has happened to the drafter's process, and when."""
        return self._lifeline.history() if self._lifeline else []

    def close(self) -> None:
        """Ends the drafter's process and gives the cores back. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._run:
            self._run.close()  # a stream that its reader left
        if self._crew:
            self._crew.close()
        if self._lifeline:
            if self._peer and (self._lifeline.lost or self._peer.stopped):
                self._peer.close(stuck=True)
            self._lifeline.close()
        if self._peer:
            self._peer.close(stuck=bool(self._lifeline and not self._lifeline.farewell))
        if self._trace_path and hasattr(self, "_target"):
            timeline.merge(self._trace_path)
        cores.pin(self._allowed_cpus)
        torch.set_num_threads(self._threads)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_channel(self) -> Channel | None:
        if self._peer:
            config, vocabulary = self.config, self._checked.vocabulary
            self._lifeline = ReconnectingChannel(
                self._peer.reach,
                vocabulary,
                config.draft_timeout_s,
                restarts=config.max_draft_restarts,
                give_up=self._peer.give_up,
            )
            self._lifeline.settle()
            return self._lifeline
        if not self.schedule.drafts:
            return None
        here, there = LocalChannel.pair()
        here.peer_step = Drafter(draft_source(self.config), there, trace=drafter_trace(self.config)).step
        return here

    @contextlib.contextmanager
    def _everything(self) -> Iterator[Target]:
        """A target on all the cores or devices that the two roles use together, for ar-all."""
        target_on, draft_on = self._checked.target_on, self._checked.draft_on
        devices = tuple(dict.fromkeys(target_on.devices + draft_on.devices))
        if not target_on.on_cpu and len(devices) > len(target_on.devices):
            if not self._spread:
                self._spread = Target(load_target(replace(self._checked, target_on=Placement(devices))))
            yield self._spread
            return
        cpus = sorted({*self.target_cpus, *self.draft_cpus})
        cores.pin(cpus)
        torch.set_num_threads(len(cpus))
        try:
            yield self._target
        finally:
            cores.pin(self.target_cpus)
            torch.set_num_threads(len(self.target_cpus))


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Not a method of the engine, which a text that is kept would then keep, models and all."""
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _generation(text: Text, places: int, sent: int) -> Generation:
    """A text that is over."""
    stopper = text.stopper
    assert stopper.finish, "a result before the end"
    stats = records.GenerationStats(
        mode=text.schedule.mode,
        prompt_tokens=len(text.request.prompt),
        tokens=tuple(stopper.tokens),
        text=stopper.text,
        finish=stopper.finish,
        passes=tuple(text.passes),
        drafter=text.report,
        bytes_on_wire=sent,
        peak_memory=memory.peak() + (text.report.memory if text.report else 0),
        places=places,
        began_s=text.placed,
        ended_s=text.ended,
    )
    return Generation(list(stopper.tokens), stats.text, stopper.finish, stats)


def _several(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is a list of prompts; one prompt is a text, or holds numbers or messages."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], str | list | tuple)


def _schedule(mode: str | Schedule, gamma: int | str) -> Schedule:
    return mode if isinstance(mode, Schedule) else Schedule.of(mode, gamma)


def count_processes(schedule: Schedule, asked: int | None, world: World) -> int:
    """How many processes an engine has: as many as asked for, or as its schedule needs. Raises `UsageError`."""
    if asked not in (None, 1, 2):
        raise UsageError(f"processes must be 1 or 2, not {asked!r}.")
    if world.size == 2:
        if asked == 1:
            raise UsageError("The launcher started two processes, but processes is 1: use plain python.")
        return 2
    if asked == 1:
        _refuse_alone(schedule)
    return asked or (2 if schedule.drafts else 1)


def _refuse_alone(schedule: Schedule) -> None:
    if schedule.drafts and (schedule.pre_verify or schedule.post_verify):
        raise UsageError(
            f"{schedule.mode} drafts and verifies at the same time, which takes two processes; sd and ar run in one."
        )


def _bytes(channel: Channel | None) -> int:
    return channel.bytes_sent + channel.bytes_received if channel else 0
