"""Runs problems in several modes, interleaved, and writes what happened. Every evaluation stands on this.

The modes of one problem follow one another in the same processes before the next problem begins, in an order that
rotates, so that their ratios hold on a machine whose speed drifts. What a run leaves behind, and how it goes on after
an interruption, is told in `pearl.evaluation.results`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pearl.core import records
from pearl.core.records import Key
from pearl.core.sampling import SamplingParams
from pearl.core.schedule import Schedule
from pearl.engine import Engine, Generation, GenerationRequest
from pearl.evaluation import metrics, results
from pearl.evaluation.progress import Board
from pearl.evaluation.results import Round
from pearl.evaluation.tables import COLUMNS, OF_A_RUN

WARM_UP_TOKENS = 8
BLOCK = 4  # times the batch size: the rounds that a mode writes before the next mode has its turn

# several texts side by side, in one mode: yields each job with what a pass has committed, and at last with all of it
Writer = Callable[[Iterable[GenerationRequest | None]], Iterator[tuple[GenerationRequest, list[int] | Generation]]]

# a mode: writes the text after a prompt, which may continue the last one that it wrote
Decoder = Callable[[Sequence[int], SamplingParams, bool], records.GenerationStats]


@dataclass(frozen=True)
class Task:
    """One problem as the harness sees it: a name, its prompts' tokens, and what of a text is its sample."""

    id: str
    prompt: Callable[[Sequence[str]], tuple[int, ...]]  # of the next turn, after these answers
    completion: Callable[[str], str] = str
    turns: int = 1
    category: str | None = None


@dataclass(frozen=True)
class Plan:
    """What to run. The first sample of a problem has the params' own seed; a repeat does the same again."""

    tasks: tuple[Task, ...]
    modes: Mapping[str, Decoder]
    params: SamplingParams
    samples: int = 1
    repeats: int = 1
    writers: Mapping[str, Writer] = field(default_factory=dict)  # of modes that write several texts side by side
    batch_size: int = 1

    @property
    def rounds(self) -> list[Round]:
        """In their order: repeats last, so that a run that is broken off has all problems rather than all repeats."""
        return [
            Round(task.id, sample, repeat)
            for repeat in range(self.repeats)
            for task in self.tasks
            for sample in range(self.samples)
        ]

    @property
    def texts(self) -> dict[str, int]:
        """How many a round of each problem makes."""
        return {task.id: task.turns * len(self.modes) for task in self.tasks}

    @property
    def digest(self) -> str:
        return results.digest((task.id, task.prompt(())) for task in self.tasks)

    def task(self, id: str) -> Task:
        return next(task for task in self.tasks if task.id == id)


def decoders(engine: Engine, schedules: Mapping[str, Schedule]) -> dict[str, Decoder]:
    """The engine's own modes."""

    def decoder(schedule: Schedule) -> Decoder:
        return lambda prompt, params, on: engine.generate(prompt, params, mode=schedule, continues=on).stats

    return {mode: decoder(schedule) for mode, schedule in schedules.items()}


def writers(engine: Engine, schedules: Mapping[str, Schedule], batch_size: int) -> dict[str, Writer]:
    """The same for several texts side by side."""

    def writer(schedule: Schedule) -> Writer:
        return lambda jobs: engine.write(jobs, mode=schedule, batch_size=batch_size)

    return {mode: writer(schedule) for mode, schedule in schedules.items()}


def run(plan: Plan, folder: Path, console: Console, rounds: Collection[Round] | None = None) -> None:
    """Decodes every problem in every mode, or only these `rounds`, and adds each round to `folder` once it is done."""
    wanted = set(plan.rounds if rounds is None else rounds)
    modes, texts = tuple(plan.modes), plan.texts
    if wanted:
        warm = replace(plan.params, max_new_tokens=min(WARM_UP_TOKENS, plan.params.max_new_tokens))
        for mode, decode in plan.modes.items():
            decode(plan.tasks[0].prompt(()), warm, False)
            if plan.batch_size > 1 and mode in plan.writers:
                tasks = plan.tasks[: plan.batch_size]
                deque(plan.writers[mode](GenerationRequest(task.prompt(()), warm) for task in tasks), maxlen=0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rounds = [one for one in plan.rounds if one in wanted]
    size = 1 if plan.batch_size == 1 else BLOCK * plan.batch_size
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("decoding", total=len(wanted) * len(modes))
        for block in (rounds[first : first + size] for first in range(0, len(rounds), size)):
            written: dict[Round, list[tuple[results.Line, list[results.Line]]]] = {one: [] for one in block}
            turn = plan.rounds.index(block[0]) // size % len(modes)
            try:
                for mode in (*modes[turn:], *modes[:turn]):
                    progress.update(bar, description=f"{block[0].task} {mode}")
                    for key, text, completion in _written(plan, block, mode, Board(progress, bar, mode)):
                        lines = results.sample_line(key, mode, text, completion), results.pass_lines(key, mode, text)
                        written[Round(key.task, key.sample, key.repeat)].append(lines)
                        progress.advance(bar, 1 / plan.task(key.task).turns)
            finally:  # also where somebody has enough: what is finished is kept
                whole = [some for one, some in written.items() if len(some) == texts[one.task]]
                if whole:
                    samples, passes = zip(*(line for some in whole for line in some), strict=True)
                    results.append(folder, samples, [line for some in passes for line in some])


def _written(
    plan: Plan, block: Sequence[Round], mode: str, board: Board
) -> Iterator[tuple[Key, records.GenerationStats, str]]:
    """The texts of a block in one mode: side by side where the mode can."""
    if plan.batch_size > 1 and mode in plan.writers:
        yield from _talks(plan, block, plan.writers[mode], board)
    else:
        for one in block:
            yield from _talk(plan, one, plan.modes[mode])


@dataclass
class _Talk:
    """A sample under way."""

    round: Round
    task: Task
    params: SamplingParams
    answers: list[str] = field(default_factory=list)

    def job(self, after: GenerationRequest | None = None) -> GenerationRequest:
        """Its next turn."""
        return GenerationRequest(self.task.prompt(self.answers), self.params, after)


def _talks(
    plan: Plan, block: Sequence[Round], write: Writer, board: Board
) -> Iterator[tuple[Key, records.GenerationStats, str]]:
    """Several samples side by side. The next turn of one goes before those that have not begun, where it was."""
    talks: dict[GenerationRequest, tuple[_Talk, int]] = {}
    queue: deque[GenerationRequest] = deque()
    for one in block:
        talk = _Talk(one, plan.task(one.task), replace(plan.params, seed=plan.params.seed + one.sample))
        queue.append(talk.job())
        talks[queue[-1]] = talk, 0
    left = sum(talk.task.turns for talk, _ in talks.values())

    def jobs() -> Iterator[GenerationRequest | None]:
        given = 0
        while given < left:
            given += bool(queue)
            yield queue.popleft() if queue else None

    for job, said in write(jobs()):
        talk, turn = talks[job]
        if isinstance(said, Generation):
            board.over(job)
            yield Key(*talk.round, turn), said.stats, talk.task.completion(said.text)
            continue
        board.said(job, talk.round.task, said)
        assert job.text is not None
        if job.text.stopper.finish and turn + 1 < talk.task.turns:
            talk.answers.append(job.text.stopper.text)
            queue.appendleft(talk.job(after=job))
            talks[queue[0]] = talk, turn + 1


def _talk(plan: Plan, one: Round, decode: Decoder) -> Iterator[tuple[Key, records.GenerationStats, str]]:
    """The turns of one sample, each with what of it counts."""
    task, answers = plan.task(one.task), []
    params = replace(plan.params, seed=plan.params.seed + one.sample)
    for turn in range(task.turns):
        text = decode(task.prompt(answers), params, turn > 0)
        answers.append(text.text)
        yield Key(*one, turn), text, task.completion(text.text)


def summary(engine: Engine, plan: Plan, config: dict[str, Any], runs: dict[str, metrics.Runs]) -> dict[str, Any]:
    """`summary.json`, with None for what a caller fills in later (scores)."""
    tasks = {task.id: task for task in plan.tasks}

    def gap(key: Key, index: int) -> float:
        ar = runs["ar"]
        answers = [ar[key._replace(turn=turn)].text for turn in range(key.turn)]
        return engine.top_two_gap([*tasks[key.task].prompt(answers), *ar[key].tokens[:index]])

    runs = {mode: runs[mode] for mode in plan.modes}
    modes = metrics.summarise(runs, gap, lambda key: tasks[key.task].category)
    if plan.params.rejection:  # the text depends on the drafter there; only its distribution is the target's
        for figures in modes.values():
            figures["identical_to_ar"] = figures["first_divergence_gaps"] = None
    events = [asdict(event) for event in engine.events]
    return {"config": config, "environment": environment(engine), "events": events, "modes": modes}


def environment(engine: Engine) -> dict[str, Any]:
    """Where a run took place: commit, versions, devices, threads."""
    packages = ("torch", "transformers", "accelerate", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "processor": _processor(),
        "devices": engine.runtime.devices,
        "cpus": {"target": engine.runtime.target_cpus, "drafter": engine.runtime.draft_cpus},
        "threads": {"target": len(engine.runtime.target_cpus), "drafter": len(engine.runtime.draft_cpus)},
        "processes": engine.runtime.processes,
        "load": os.getloadavg(),
        "rows": asdict(engine.model.rows),
        "draft_costs": engine.runtime.target.draft_costs,
        "command": sys.argv,
    }


def table(figures: dict[str, dict[str, Any]], title: str) -> Table:
    """The summary as a person reads it."""
    made = Table(title=title, title_justify="left", header_style="bold")
    made.add_column("mode")
    for name in OF_A_RUN:
        made.add_column(COLUMNS[name].heading, justify="right")
    for mode, values in figures.items():
        made.add_row(mode, *(COLUMNS[name].cell(values.get(name)) for name in OF_A_RUN))
    return made


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (done.stdout.strip() + ("+" if changed.stdout.strip() else "")) or None


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
