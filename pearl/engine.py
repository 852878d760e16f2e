"""The Python interface: an engine holds a target, its drafter, and the processes they run in.

with Engine.from_pretrained(target="Qwen/Qwen2.5-7B-Instruct", draft="Qwen/Qwen2.5-0.5B-Instruct") as engine:
    print(engine.generate("def fib(n):", SamplingParams(max_new_tokens=64)).text)
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pearl import cores, memory, records, timeline
from pearl.channel import Channel, LocalChannel
from pearl.config import DRAFT, EngineConfig
from pearl.drafter import Drafter
from pearl.errors import UsageError
from pearl.loading import Placed, Preflight, eos_ids, load_target, preflight
from pearl.process import Peer, World, draft_source, drafter_trace, serve, shares
from pearl.sampling import SamplingParams
from pearl.schedule import Schedule
from pearl.stopping import Stopper
from pearl.target import Target

Prompt = str | Sequence[int] | Sequence[dict]


@dataclass(frozen=True)
class Generation:
    """One text. `tokens` are the new ones, with the end-of-sequence token if it came; `facts` is its record."""

    tokens: list[int]
    text: str
    finish_reason: str  # "eos", "stop" or "length"
    facts: records.Sequence


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
        world = World.here()
        self.processes = count_processes(self.schedule, processes, world)
        checked = checked or preflight(config, world.roles)
        two = self.processes == 2 or self.schedule.mode == "ar-all"
        self.target_cpus, self.draft_cpus = shares(config, two and not world.apart)
        if world.rank == 1:
            serve(config, self.draft_cpus)
            raise SystemExit(0)

        self._trace_path = Path(config.trace).absolute() if config.trace else None
        if self._trace_path:
            timeline.prepare(self._trace_path)
        self._allowed_cpus, self._threads = cores.available(), torch.get_num_threads()
        self._peer: Peer | None = None
        self._closed = False
        self._run: Generator[int, None, None] | None = None  # the text under way
        self._spread: Target | None = None  # over all devices, for ar-all on GPUs
        atexit.register(self.close)
        try:
            if self.processes == 2:  # the drafter loads its model meanwhile
                self._peer = Peer(config, world, self.draft_cpus)
            cores.pin(self.target_cpus)
            torch.set_num_threads(len(self.target_cpus))
            self.tokenizer = checked.tokenizer
            self.model = load_target(checked)
            self._checked = checked
            self._eos = eos_ids(self.model.model, self.tokenizer)
            trace = timeline.Trace("target", self._trace_path) if self._trace_path else timeline.OFF
            self._target = Target(self.model, self._open_channel(), trace=trace)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        mode: str | Schedule | None = None,
        gamma: int | str = "auto",
        continues: bool = False,
    ) -> Generation:
        """The whole text that follows `prompt`: text, token ids, or chat messages (dicts with "role" and "content").

        `mode` and `gamma` replace the engine's own for this text. `continues`: the prompt begins with the last text,
        which both models need not read again. Raises `UsageError` for an empty or too long prompt.
        """
        run = self._prepare(prompt, params, mode, gamma, continues)
        for _ in run.tokens():
            pass
        return run.result()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        mode: str | Schedule | None = None,
        gamma: int | str = "auto",
        continues: bool = False,
    ) -> Iterator[int]:
        """The same tokens, one by one, as they are committed. What is yielded is never taken back."""
        return self._prepare(prompt, params, mode, gamma, continues).tokens()

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as `generate` reads it."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        if prompt and isinstance(prompt[0], dict):
            if not self.tokenizer.chat_template:
                raise UsageError("This tokenizer has no chat template: give the prompt as text.")
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(prompt)  # type: ignore[arg-type]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

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
        plan, lines = self.model.rows, []
        shares = {"target": (self.config.target, self.target_cpus), "drafter": (self.config.draft, self.draft_cpus)}
        for role, devices in self.devices.items():
            name, cpus = shares[role]
            where = (
                f"cpus {','.join(map(str, cpus))}, {len(cpus)} threads" if devices == ["cpu"] else ", ".join(devices)
            )
            lines.append(f"{role}: {name} on {where}")
        if self.drafter_pid:
            lines[-1] += (
                f" (no launcher started two processes, so the drafter was started as process {self.drafter_pid})"
            )
        if plan.exact:
            lines.append(
                f"rows: a pass is padded to one of {', '.join(map(str, plan.safe))}; these give equal bits here"
            )
        else:
            lines.append(
                "rows: the bits depend on the row count on this device; near-equal logits may pick differently"
            )
        return "\n".join(lines)

    @property
    def draft_costs(self) -> tuple[float, ...]:
        """Seconds of a drafter forward by its rows, once a text has been drafted; empty without a draft model."""
        return self._target.draft_costs

    @property
    def drafter_pid(self) -> int | None:
        """Of the drafter's process if this engine has started it; None if a launcher did, or there is none."""
        return self._peer.pid if self._peer else None

    def close(self) -> None:
        """Ends the drafter's process and gives the cores back. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._run:
            self._run.close()  # a stream that its reader left
        if self._peer:
            self._peer.close()
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
            self._peer.connect()
            return self._peer.link
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
                self._spread = Target(load_target(replace(self._checked, target_on=Placed(devices))))
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

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        mode: str | Schedule | None,
        gamma: int | str,
        continues: bool,
    ) -> _Run:
        params = params or SamplingParams()
        schedule = _schedule(mode, gamma) if mode else self.schedule
        if self._closed:
            raise UsageError("This engine is closed: make another one.")
        if schedule.drafts and self._target.channel is None:
            raise UsageError(
                f"This engine was made for {self.schedule.mode} and has no drafter: make one for {schedule.mode}."
            )
        if self.processes == 1:
            _refuse_alone(schedule)
        tokens = self.encode(prompt)
        self._checked.check_prompt(tokens, params.max_new_tokens)
        if self._run:
            self._run.close()  # a stream that its reader left
        return _Run(self, tokens, params, schedule, continues)


class _Run:
    """One text under way: its tokens, then its result."""

    def __init__(self, engine: Engine, prompt: list[int], params: SamplingParams, schedule: Schedule, continues: bool):
        self._engine, self._prompt, self._params, self._schedule = engine, prompt, params, schedule
        self._continues = continues
        self._stopper = Stopper(params, engine._eos, engine.decode)
        self._target = engine._target
        self._bytes = 0

    def tokens(self) -> Generator[int, None, None]:
        self._engine._run = self._iterate()
        return self._engine._run

    def _iterate(self) -> Generator[int, None, None]:
        memory.reset_peak()
        everything = self._schedule.mode == "ar-all"
        with self._engine._everything() if everything else contextlib.nullcontext(self._target) as self._target:
            before = _bytes(self._target.channel)
            decoding = self._target.decode(self._prompt, self._schedule, self._params, self._stopper, self._continues)
            for committed in decoding:
                self._bytes = _bytes(self._target.channel) - before
                yield from committed

    def result(self) -> Generation:
        stopper, target = self._stopper, self._target
        assert stopper.finish, "a result before the end"
        facts = records.Sequence(
            mode=self._schedule.mode,
            prompt_tokens=len(self._prompt),
            tokens=tuple(stopper.tokens),
            text=stopper.text,
            finish=stopper.finish,
            passes=tuple(target.passes),
            drafter=target.report,
            bytes_on_wire=self._bytes,
            peak_memory=memory.peak() + (target.report.memory if target.report else 0),
        )
        return Generation(list(stopper.tokens), facts.text, stopper.finish, facts)


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
