"""The target's process of an engine: its model, the way to the drafter, and all that has to end with it.

Models are loaded in a thread of its own, and the engine runs them in its own: cores and numbers of threads are those
threads', and the caller's stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from pearl.checkpoints.placement import Placement
from pearl.checkpoints.preflight import Preflight
from pearl.checkpoints.targets import eos_ids, load_target
from pearl.config import outputs
from pearl.config.engine_config import SUFFIX, EngineConfig
from pearl.core.schedule import Schedule
from pearl.drafters.text_memory import TextMemory
from pearl.errors import UsageError, WorkerLostError
from pearl.machine import cores, launcher, timeline
from pearl.machine.files import held
from pearl.models.numerics_check import rows_check
from pearl.parallel.draft_sources import draft_source, sources_beside_target
from pearl.parallel.drafter_main import trace
from pearl.parallel.drafter_process import DrafterProcess
from pearl.parallel.tensor_parallel import TensorParallelWorkers
from pearl.parallel.world import World
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import Channel, LocalChannel
from pearl.wire.reconnecting_channel import DrafterEvent, ReconnectingChannel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Who runs where."""

    checked: Preflight
    schedule: Schedule  # what is written unless told otherwise
    world: World
    processes: int  # of the two roles
    target_cpus: list[int]  # of this process
    draft_cpus: list[int]
    tp_cpus: list[list[int]]  # of each rank of the target on this machine


class Runtime:
    """Made by `pearl.parallel.launch.launch`. Closing twice is harmless."""

    def __init__(self, layout: Layout):
        self.layout, self.schedule, self.processes = layout, layout.schedule, layout.processes
        self.checked, self.config, self.tokenizer = layout.checked, layout.checked.config, layout.checked.tokenizer
        self.target_cpus, self.draft_cpus = layout.target_cpus, layout.draft_cpus
        for drafting in filter(None, (self.checked.drafting, self.checked.beside)):
            for warning in drafting.warnings:
                _log.warning("%s", warning)
        self._peer: DrafterProcess | None = None
        self._workers: TensorParallelWorkers | None = None
        self._connection: ReconnectingChannel | None = None
        self._spread: Target | None = None  # over all devices, for ar-all on GPUs
        self._memory_path = _checked_memory(self.config)
        self._saved = self._loaded = 0  # tokens: in its file, and of these in the memory
        self._trace_path = Path(self.config.trace).absolute() if self.config.trace else None
        if self._trace_path:
            timeline.prepare(self._trace_path)
        with contextlib.ExitStack() as opened:
            if path := self._memory_path:
                taken = f"Another engine keeps its memory in {path}: wait for its end, or name another memory_file."
                opened.enter_context(held(path.with_name(f".{path.name}.lock"), taken))
            self._memory = self._load_memory()
            opened.callback(launcher.leave)
            cores.in_a_thread(lambda: self._open(opened))
            self._opened = opened.pop_all()

    def _open(self, opened: contextlib.ExitStack) -> None:
        """`opened` holds what is to be closed, the last first."""
        layout, world = self.layout, self.layout.world
        direct = self.checked.features_from(world.two_hosts)
        if self.processes == 2:  # the drafter loads its model meanwhile
            self._peer = DrafterProcess(self.config, world, self.draft_cpus, direct)
            opened.callback(self._end_drafter, self._peer)
        if world.tp_size > 1:
            self._workers = TensorParallelWorkers(self.config, world, layout.tp_cpus)
            opened.callback(self._workers.close)
            self._workers.gather()
        with self.on_its_cores():
            self.model = load_target(self.checked, self._workers)
            stay = direct or not self.checked.shares.drafter  # what nobody sends needs no copy
            self.model.features_stay = bool(self._peer and stay and not self._workers)
            self.eos = eos_ids(self.model.model, self.tokenizer)
            self.target = Target(
                self.model,
                self._open_channel(),
                trace=trace(self.config, "target"),
                prefill_tokens=self.config.prefill_tokens,
                sources=sources_beside_target(self.config, self.checked, self._memory),
                shares=self.checked.shares,
            )
        if self._memory is not None and self._memory_path:
            opened.callback(_save, self._memory, self._memory_path, self.checked.vocabulary)

    def _load_memory(self) -> TextMemory | None:
        """That of earlier texts; before models are loaded, as its file may be none."""
        config, vocabulary = self.config, self.checked.vocabulary
        if not config.memory:
            return None
        memory = TextMemory(config.memory)
        if (path := self._memory_path) and path.exists():
            self._saved, self._loaded = memory.load(path, vocabulary), memory.size
        return memory

    @property
    def _memory_line(self) -> str:
        """What was loaded."""
        line = f"{self._loaded:,} tokens of earlier texts, up to {self.config.memory:g} MB"
        if self._loaded < self._saved:
            line += f"; of the {self._saved:,} in {self._memory_path} no more fit in"
        return line

    def begin_round(self, forget: bool = False) -> None:
        """What is read and written from now on helps other texts from the next round on: of modes that are compared
        none helps another. `forget`: what was in the last round helps none. To be called between two texts."""
        self.model.begin_round(forget)
        self.target.begin_round(forget)

    def on_its_cores(self) -> AbstractContextManager[None]:
        """The calling thread is where the target's passes run."""
        return self._on(self.target_cpus)

    def _on(self, cpus: list[int]) -> AbstractContextManager[None]:
        return cores.running_on(cpus) if self.config.pins else contextlib.nullcontext()

    def _open_channel(self) -> Channel | None:
        if self._peer:
            self._connection = ReconnectingChannel(
                self._peer.reach,
                self.checked.vocabulary,
                self.config.draft_timeout_s,
                restarts=self.config.max_draft_restarts,
                give_up=self._peer.give_up,
            )
            self._connection.settle()
            return self._connection
        if not self.schedule.drafts:
            return None
        here, there = LocalChannel.pair()
        source = draft_source(self.config, self.checked)
        here.peer_step = Drafter(source, there, trace=trace(self.config, "drafter")).step
        return here

    def close(self) -> None:
        """Ends the processes that this one started."""
        self._opened.close()
        if self._trace_path:
            timeline.merge(self._trace_path)
            self._trace_path = None

    def check(self) -> None:
        """Raises `WorkerLostError` if the launcher of this process has ended, and cannot end the others any more. Asked
        every pass, as the process is its user's, who decides what becomes of it then."""
        if launcher.orphaned(self.layout.world.here):
            raise WorkerLostError("The launcher of this process has ended, so its engine writes no more.")

    def _end_drafter(self, peer: DrafterProcess) -> None:
        if self._connection:
            if self._connection.lost or peer.stopped:
                peer.close(stuck=True)
            self._connection.close()
        peer.close(stuck=not (self._connection and self._connection.closed_cleanly))

    @contextlib.contextmanager
    def target_for(self, schedule: Schedule) -> Iterator[Target]:
        """The target; for ar-all, on all the cores or devices that the two roles use together."""
        target_on, draft_on = self.checked.target_on, self.checked.draft_on
        devices = tuple(dict.fromkeys(target_on.devices + draft_on.devices))
        if schedule.mode != "ar-all":
            yield self.target
        elif not target_on.on_cpu and len(devices) > len(target_on.devices):
            if not self._spread:
                self._spread = Target(load_target(replace(self.checked, target_on=Placement(devices))))
            yield self._spread
        else:
            with self._on(sorted({*self.target_cpus, *self.draft_cpus})):
                yield self.target

    # What it says of itself

    @property
    def drafter_pid(self) -> int | None:
        """Of the drafter's process if it was started here; None if a launcher did, or there is none."""
        return self._peer.pid if self._peer else None

    @property
    def events(self) -> list[DrafterEvent]:
        """What has happened to the drafter's process, and when."""
        return self._connection.history() if self._connection else []

    @property
    def devices(self) -> dict[str, list[str]]:
        """Where the two models are."""
        places = {"target": self.checked.target_on}
        if self.processes == 2:
            places["drafter"] = self.checked.draft_on
        return {role: list(placed.devices) for role, placed in places.items()}

    @property
    def _shares_a_core(self) -> bool:
        """Two models that are to work at the same time."""
        on_cpu = all(devices == ["cpu"] for devices in self.devices.values())
        one_machine = self.processes == 2 and not self.layout.world.two_hosts
        works = one_machine and on_cpu and self.config.pins and self.config.draft_has_files
        return works and bool(set(self.target_cpus) & set(self.draft_cpus))

    @property
    def description(self) -> str:
        """A few lines for a person: who runs where, and how the bits are kept equal."""
        lines = []
        shares = {"target": (self.config.target, self.target_cpus), "drafter": (self.config.draft, self.draft_cpus)}
        for role, devices in self.devices.items():
            name, cpus = shares[role]
            where = ", ".join(devices)
            if devices == ["cpu"] and self.config.pins:
                several = "s" * (len(cpus) > 1)
                where = f"cpu{several} {','.join(map(str, cpus))} with {len(cpus)} thread{several}"
            if role == "target" and self.config.tensor_parallel_size > 1:
                where += f", as rank 0 of {self.config.tensor_parallel_size}"
            if role == "drafter" and self.config.synthetic:
                name = f"{name}, a stand-in that is told what the target writes: all figures are synthetic,"
            who = "no model, the text itself drafts," if role == "drafter" and name == SUFFIX else name
            lines.append(f"{role}: {who} on {where}")
        if self._workers and self._workers.pids:
            lines[0] += f" (the others were started as processes {', '.join(map(str, self._workers.pids))})"
        if self.drafter_pid:
            lines[-1] += f" (started as process {self.drafter_pid})"
        if self._shares_a_core:
            lines.append("cores: target and drafter share one, so of the modes that draft only sd can pay")
        if self.checked.drafting and self.layout.schedule.drafts:
            lines.append(f"draft: {self.checked.drafting.line}")
        if self.checked.beside:
            lines.append(f"target draft: {self.checked.beside.line}")
        if self._memory is not None:
            lines.append(f"memory: {self._memory_line}")
        checks = (rows_check(self.model.buckets), *(check for check in self.model.checks if check.what != "rows"))
        return "\n".join([*lines, *(f"{check.what}: {check.found}" for check in checks)])


def _checked_memory(config: EngineConfig) -> Path | None:
    """The file of a memory of earlier texts, if it has one. One that can't be had or kept here is refused, before
    models are loaded."""
    path = outputs.file(config.memory_file).absolute() if config.memory_file else None
    free = psutil.virtual_memory().available / 1e6
    if config.memory > free / 2:
        raise UsageError(f"memory {config.memory:g} is more than half of the {free:.0f} MB that are free: lower it.")
    return path


def _save(memory: TextMemory, path: Path, vocabulary: int) -> None:
    try:
        memory.save(path, vocabulary)
    except OSError as error:  # the texts themselves are written
        _log.warning("the memory can't be saved to %s: %s", path, error)
