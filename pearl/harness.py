"""Runs problems in several modes, interleaved, and writes what happened. Every evaluation script stands on this.

The modes of one problem follow one another in the same processes before the next problem begins, in an order that
rotates, so that their ratios hold on a machine whose speed drifts. Files of a run:

    samples.jsonl    a line a text; what `evaluate_functional_correctness` reads
    passes.jsonl     a line a target pass
    summary.json     config, environment, and the figures of each mode, derived from those facts
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pearl import metrics, records
from pearl.engine import Engine
from pearl.sampling import SamplingParams
from pearl.schedule import Schedule

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Task:
    """One problem as the harness sees it: a name, the prompt's tokens, and what of a text is its sample."""

    id: str
    prompt: tuple[int, ...]
    completion: Callable[[str], str]


@dataclass(frozen=True)
class Plan:
    """What to run. The first sample of a problem has the params' own seed."""

    tasks: tuple[Task, ...]
    schedules: dict[str, Schedule]  # by the name of the mode
    params: SamplingParams
    samples: int = 1


class Output:
    """The files of a run, in one folder. Those of an earlier run there are kept beside them as `*.previous`."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("samples.jsonl", "passes.jsonl", "summary.json"):
            if (folder / name).exists():
                (folder / name).replace(folder / f"{name}.previous")

    def append(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(text)

    def write(self, name: str, value: Any) -> None:
        """The whole file or none of it."""
        partial = self._folder / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._folder / name)


def run(engine: Engine, plan: Plan, output: Output, console: Console) -> dict[str, metrics.Runs]:
    """Decodes every problem in every mode. Returns the texts by mode, problem and sample."""
    modes = tuple(plan.schedules)
    runs: dict[str, metrics.Runs] = {mode: {} for mode in modes}
    warm = replace(plan.params, max_new_tokens=min(WARM_UP_TOKENS, plan.params.max_new_tokens))
    for schedule in plan.schedules.values():
        engine.generate(plan.tasks[0].prompt, warm, mode=schedule)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("decoding", total=len(plan.tasks) * plan.samples * len(modes))
        for number, task in enumerate(plan.tasks):
            for sample in range(plan.samples):
                params = replace(plan.params, seed=plan.params.seed + sample)
                turn = (number * plan.samples + sample) % len(modes)
                for mode in (*modes[turn:], *modes[:turn]):
                    progress.update(bar, description=f"{task.id} {mode}")
                    text = engine.generate(task.prompt, params, mode=plan.schedules[mode]).facts
                    runs[mode][task.id, sample] = text
                    output.append("samples.jsonl", [_sample(task, mode, sample, text)])
                    output.append("passes.jsonl", _passes(task, mode, sample, text))
                    progress.advance(bar)
    return runs


def summary(engine: Engine, plan: Plan, config: dict[str, Any], runs: dict[str, metrics.Runs]) -> dict[str, Any]:
    """`summary.json`, with None for what a caller fills in later (pass@k)."""
    prompts = {task.id: task.prompt for task in plan.tasks}
    by_text = {id(text): prompts[key[0]] for texts in runs.values() for key, text in texts.items()}

    def gap(text: records.Sequence, index: int) -> float:
        return engine.top_two_gap([*by_text[id(text)], *text.tokens[:index]])

    modes = metrics.summarise(runs, gap)
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
    for name, *_ in _COLUMNS:
        made.add_column(name, justify="right")
    for mode, values in figures.items():
        made.add_row(mode, *(_cell(values.get(key), form) for _, key, form in _COLUMNS))
    return made


_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("tok/s", "tokens_per_second", "{:.2f}"),
    ("x ar", "speedup_vs_ar", "{:.2f}"),
    ("same", "identical_to_ar", "{:.0%}"),
    ("tok/pass", "tokens_per_pass", "{:.2f}"),
    ("accept", "acceptance", "{:.2f}"),
    ("ready", "misses_prepared", "{:.0%}"),
    ("target", "target_busy", "{:.0%}"),
    ("drafter", "drafter_busy", "{:.0%}"),
    ("first ms", "ttft_ms", "{:.0f}"),
    ("p50", "tpot_ms_p50", "{:.0f}"),
    ("p95", "tpot_ms_p95", "{:.0f}"),
    ("B/pass", "bytes_per_pass", "{:.0f}"),
    ("pass@1", "pass_at_1", "{:.2f}"),
)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _sample(task: Task, mode: str, sample: int, text: records.Sequence) -> dict[str, Any]:
    return {
        "task_id": task.id,
        "completion": task.completion(text.text),
        "mode": mode,
        "sample": sample,
        "text": text.text,
        "tokens": list(text.tokens),
        "finish": text.finish,
        "seconds": text.seconds,
    }


def _passes(task: Task, mode: str, sample: int, text: records.Sequence) -> Iterable[dict[str, Any]]:
    for index, one in enumerate(text.passes):
        yield {"task_id": task.id, "mode": mode, "sample": sample, "index": index, **asdict(one)}


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
