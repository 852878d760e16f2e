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
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pearl.core.params import SamplingParams
from pearl.core.records import GenerationStats, SampleKey
from pearl.core.schedule import Schedule
from pearl.engine import Engine, Generation, GenerationRequest
from pearl.evaluation import metrics, results
from pearl.evaluation.lines import Line
from pearl.evaluation.results import WorkUnit
from pearl.machine.display import Progress

WARM_UP_TOKENS = 8
NAMED = 3  # texts of a batch in the line of progress
BLOCK = 4  # times the batch size: the work units that a mode writes before the next mode has its turn

# several texts side by side, in one mode: yields each job with what a pass has committed, and at last with all of it
Writer = Callable[[Iterable[GenerationRequest | None]], Iterator[tuple[GenerationRequest, list[int] | Generation]]]

# a mode: writes the text after a prompt, which may continue the last one that it wrote
Decoder = Callable[[Sequence[int], SamplingParams, bool], GenerationStats]


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
    def units(self) -> list[WorkUnit]:
        """In their order: repeats last, so that a run that is broken off has all problems rather than all repeats."""
        return [
            WorkUnit(task.id, sample, repeat)
            for repeat in range(self.repeats)
            for task in self.tasks
            for sample in range(self.samples)
        ]

    @property
    def texts(self) -> dict[str, int]:
        """How many a unit of each problem makes."""
        return {task.id: task.turns * len(self.modes) for task in self.tasks}

    @property
    def digest(self) -> str:
        return results.digest((task.id, task.prompt(())) for task in self.tasks)


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


def run(plan: Plan, folder: Path, units: Collection[WorkUnit] | None = None) -> None:
    """Decodes every problem in every mode, or only these `units`, and adds each unit to `folder` once it is done."""
    wanted = plan.units if units is None else [one for one in plan.units if one in set(units)]
    if wanted:
        _warm_up(plan)
    modes, tasks = tuple(plan.modes), {task.id: task for task in plan.tasks}
    size = 1 if plan.batch_size == 1 else BLOCK * plan.batch_size
    with Progress("decoding", len(wanted) * len(modes)) as progress:
        for block in (wanted[first : first + size] for first in range(0, len(wanted), size)):
            written: dict[WorkUnit, list[tuple[Line, list[Line]]]] = {unit: [] for unit in block}
            talks = [Conversation(unit, tasks[unit.task], plan.params) for unit in block]
            turn = plan.units.index(block[0]) // size % len(modes)
            try:
                for mode in (*modes[turn:], *modes[:turn]):
                    progress.show(f"{block[0].task} {mode}")
                    for key, prompt, text in _written(plan, talks, mode, progress):
                        completion = tasks[key.task].completion(text.text)
                        sample = results.sample_line(key, mode, prompt, text, completion)
                        written[WorkUnit(*key[:3])].append((sample, results.pass_lines(key, mode, text)))
                        progress.advance(1 / tasks[key.task].turns)
            finally:  # also where somebody has enough: what is finished is kept
                whole = [some for unit, some in written.items() if len(some) == plan.texts[unit.task]]
                if whole:
                    samples, passes = zip(*(both for some in whole for both in some), strict=True)
                    results.append(folder, samples, [line for some in passes for line in some])


def _warm_up(plan: Plan) -> None:
    """Every mode writes a few tokens that nobody records: first forwards are slow."""
    warm = replace(plan.params, max_new_tokens=min(WARM_UP_TOKENS, plan.params.max_new_tokens))
    for mode, decode in plan.modes.items():
        decode(plan.tasks[0].prompt(()), warm, False)
        if plan.batch_size > 1 and mode in plan.writers:
            tasks = plan.tasks[: plan.batch_size]
            deque(plan.writers[mode](GenerationRequest(task.prompt(()), warm) for task in tasks), maxlen=0)


Text = tuple[SampleKey, Sequence[int], GenerationStats]  # which it is, its prompt, and what happened


@dataclass(frozen=True)
class Conversation:
    """One work unit in one mode: turn by turn, each after the answers before it."""

    unit: WorkUnit
    task: Task
    params: SamplingParams  # of the first sample; each has a seed of its own

    def request(self, answers: Sequence[str], after: GenerationRequest | None = None) -> GenerationRequest:
        """Its next turn."""
        params = replace(self.params, seed=self.params.seed + self.unit.sample)
        return GenerationRequest(self.task.prompt(answers), params, after)

    def alone(self, decode: Decoder) -> Iterator[Text]:
        """All its turns, one after the other."""
        answers: list[str] = []
        for turn in range(self.task.turns):
            prompt = self.task.prompt(answers)
            text = decode(prompt, self.request(answers).params, turn > 0)
            answers.append(text.text)
            yield SampleKey(*self.unit, turn), prompt, text


def _written(plan: Plan, talks: Sequence[Conversation], mode: str, progress: Progress) -> Iterator[Text]:
    """The texts of a block in one mode: side by side where the mode can."""
    if plan.batch_size > 1 and mode in plan.writers:
        yield from _side_by_side(talks, plan.writers[mode], ProgressLine(progress, mode))
    else:
        for talk in talks:
            yield from talk.alone(plan.modes[mode])


def _side_by_side(talks: Sequence[Conversation], write: Writer, line: ProgressLine) -> Iterator[Text]:
    """The next turn of a conversation goes before those that have not begun, into the slot that it had."""
    queue = deque(talk.request(()) for talk in talks)
    under_way: dict[GenerationRequest, tuple[Conversation, list[str]]] = {
        request: (talk, []) for request, talk in zip(queue, talks, strict=True)
    }
    left = sum(talk.task.turns for talk in talks)

    def requests() -> Iterator[GenerationRequest | None]:
        given = 0
        while given < left:
            given += bool(queue)
            yield queue.popleft() if queue else None

    for request, news in write(requests()):
        talk, answers = under_way[request]
        if isinstance(news, Generation):
            line.over(request)
            yield SampleKey(*talk.unit, len(answers)), talk.task.prompt(answers), news.stats
            continue
        line.said(request, talk.unit.task, news)
        assert request.text is not None
        if request.text.stopper.finish and len(answers) + 1 < talk.task.turns:
            answers = [*answers, request.text.stopper.text]
            queue.appendleft(talk.request(answers, after=request))
            under_way[queue[0]] = talk, answers


def summary(engine: Engine, plan: Plan, config: dict[str, Any], runs: Mapping[str, metrics.Runs]) -> dict[str, Any]:
    """`summary.json`, with None for what a caller fills in later (scores)."""
    tasks, runs = {task.id: task for task in plan.tasks}, {mode: runs[mode] for mode in plan.modes}
    modes = metrics.summarise(runs, lambda key: tasks[key.task].category)
    for mode, figures in modes.items():
        if plan.params.rejection:  # the text depends on the drafter there; only its distribution is the target's
            figures["identical_to_ar"] = None
        elif ar := runs.get("ar"):
            figures["first_divergence_gaps"] = [
                engine.top_two_gap([*tasks[key.task].prompt(_before(ar, key)), *ar[key].tokens[:index]])
                for key, index in metrics.divergences(runs[mode], ar)
            ]
    events = [asdict(event) for event in engine.events]
    return {"config": config, "environment": environment(engine), "events": events, "modes": modes}


class ProgressLine:
    """What a batch is doing, in one line: mode, speed, texts under way and the longest of them."""

    def __init__(self, progress: Progress, mode: str):
        self._progress, self._mode = progress, mode
        self._under_way: dict[GenerationRequest, tuple[str, int]] = {}  # the name and the tokens of each
        self._tokens, self._began = 0, time.perf_counter()

    def said(self, request: GenerationRequest, name: str, tokens: Sequence[int]) -> None:
        """A pass has committed these tokens of a text."""
        self._tokens += len(tokens)
        self._under_way[request] = name, self._under_way.get(request, (name, 0))[1] + len(tokens)
        self._progress.show(str(self))

    def over(self, request: GenerationRequest) -> None:
        self._under_way.pop(request, None)
        self._progress.show(str(self))

    def __str__(self) -> str:
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        longest = sorted(self._under_way.values(), key=lambda text: -text[1])[:NAMED]
        names = ", ".join(f"{name} {tokens}" for name, tokens in longest)
        return f"{self._mode} {rate:.0f} tok/s, {len(self._under_way)} texts: {names}"


def _before(runs: metrics.Runs, key: SampleKey) -> list[str]:
    """The answers of the turns before this one."""
    return [runs[key._replace(turn=turn)].text for turn in range(key.turn)]


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
