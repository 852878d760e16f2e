"""Runs problems in several modes, interleaved, and writes what happened. Every evaluation stands on this.

The modes of one problem follow one another in the same processes before the next problem begins, in an order that
rotates, so that their ratios hold on a machine whose speed drifts. What a run leaves behind, and how it goes on after
an interruption, is told in `pearl.results`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pearl import metrics, records, results
from pearl.engine import Engine
from pearl.records import Key
from pearl.results import Round
from pearl.sampling import SamplingParams
from pearl.schedule import Schedule
from pearl.tables import COLUMNS, OF_A_RUN

WARM_UP_TOKENS = 8

# a mode: writes the text after a prompt, which may continue the last one that it wrote
Decoder = Callable[[Sequence[int], SamplingParams, bool], records.Sequence]


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
        return lambda prompt, params, on: engine.generate(prompt, params, mode=schedule, continues=on).facts

    return {mode: decoder(schedule) for mode, schedule in schedules.items()}


def run(plan: Plan, folder: Path, console: Console, rounds: Collection[Round] | None = None) -> None:
    """Decodes every problem in every mode, or only these `rounds`, and adds each round to `folder` once it is done."""
    wanted = set(plan.rounds if rounds is None else rounds)
    modes = tuple(plan.modes)
    if wanted:
        warm = replace(plan.params, max_new_tokens=min(WARM_UP_TOKENS, plan.params.max_new_tokens))
        for decode in plan.modes.values():
            decode(plan.tasks[0].prompt(()), warm, False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("decoding", total=len(wanted) * len(modes))
        for number, one in enumerate(plan.rounds):
            if one not in wanted:
                continue
            samples, passes = [], []
            turn = number % len(modes)
            for mode in (*modes[turn:], *modes[:turn]):
                progress.update(bar, description=f"{one.task} {mode}")
                for key, text, completion in _talk(plan, one, plan.modes[mode]):
                    samples.append(results.sample_line(key, mode, text, completion))
                    passes += results.pass_lines(key, mode, text)
                progress.advance(bar)
            results.append(folder, samples, passes)


def _talk(plan: Plan, one: Round, decode: Decoder) -> Iterator[tuple[Key, records.Sequence, str]]:
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
    return {"config": config, "environment": environment(engine), "modes": modes}


def environment(engine: Engine) -> dict[str, Any]:
    """Where a run took place: commit, versions, devices, threads."""
    packages = ("torch", "transformers", "accelerate", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "processor": _processor(),
        "devices": engine.devices,
        "cpus": {"target": engine.target_cpus, "drafter": engine.draft_cpus},
        "threads": {"target": len(engine.target_cpus), "drafter": len(engine.draft_cpus)},
        "processes": engine.processes,
        "load": os.getloadavg(),
        "rows": asdict(engine.model.rows),
        "draft_costs": engine.draft_costs,
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
    root = Path(__file__).resolve().parent.parent
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
