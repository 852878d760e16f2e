"""Runs problems in several modes, interleaved, and writes what happened. Every evaluation stands on this.

The modes of one problem follow one another in the same processes before the next problem begins, in an order that
rotates, so that their ratios hold on a machine whose speed drifts. What a run leaves behind, and how it goes on after
an interruption, is told in `pearl.evaluation.results`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pearl.core.params import SamplingParams
from pearl.core.records import GenerationStats, SampleKey
from pearl.core.schedule import Schedule
from pearl.engine import Engine, Generation, GenerationRequest
from pearl.errors import UsageError
from pearl.evaluation import metrics, results
from pearl.evaluation.lines import Line
from pearl.evaluation.measures import repeats
from pearl.evaluation.measures.environment import environment
from pearl.evaluation.results import WorkUnit
from pearl.machine.display import Progress
from pearl.machine.energy import EnergyMeter

WARM_UP_TOKENS = 8
SAME = "identical_to_ar"
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
    repeats: Callable[[str], tuple[int, int]] | None = None  # where an answer repeats its prompt, in characters


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
    limit: int = sys.maxsize  # tokens that a text may have, with its prompt
    # what is read and written from now on helps others from the next call on, so that no mode works for another; if
    # that says so, it helps nobody
    begin_round: Callable[[bool], object] = lambda forget: None
    skip_too_long: bool = False  # leave out problems that a later turn shows to be too long
    interval: float | None = None  # stop once those of all speed-ups are at most this part of them
    meter: EnergyMeter | None = None  # of what writes one text at a time
    first: str | None = None  # the mode that begins every block, in place of each in turn
    until: float = math.inf  # begin nothing that will end later, by `time.monotonic`, as far as one can tell

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


class TooLong(UsageError):
    """A prompt and what is to come after it are more than a text may have."""

    def __init__(self, task: str, turn: int, prompt: int, new: int, limit: int, others: int = 0):
        """`others`: problems beside this one of which the same was found."""
        self.line = {"task_id": task, "turn": turn, "tokens": prompt, "limit": limit}
        of_turn = f", turn {turn + 1}" if turn else ""
        more = f" ({others} more problems are too)" if others > 1 else " (one more problem is too)" if others else ""
        go_on = "--resume --skip-too-long, as what was finished is kept" if turn else "--skip-too-long"
        super().__init__(
            f"{task}{of_turn} is too long{more}: its prompt's {prompt} tokens and max_new_tokens {new} are more than "
            f"the {limit} that a text may have. Lower --max-new-tokens, raise --max-length as far as the model allows, "
            f"choose other problems, or go on without such by {go_on}."
        )


def fitting(tasks: Sequence[Task], params: SamplingParams, limit: int) -> tuple[list[Task], TooLong | None, list[Line]]:
    """The tasks all of whose turns fit however long their answers get, what is wrong with the first of the others, and
    a line of each of those."""
    fit, long = [], []
    for task in tasks:
        prompt, new = len(task.prompt([""] * (task.turns - 1))), task.turns * params.max_new_tokens
        if prompt + new <= limit:
            fit.append(task)
        else:
            long.append((task.id, 0, prompt, new, limit))
    return fit, TooLong(*long[0], others=len(long) - 1) if long else None, [TooLong(*one).line for one in long]


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
    """Decodes every problem in every mode, or only these `units`, and adds each unit to `folder` once it is done; as
    many as the plan wants for its intervals and has time for, and one block of them however little that is."""
    asked = None if units is None else set(units)
    wanted = plan.units if asked is None else [one for one in plan.units if one in asked]
    if wanted:
        _warm_up(plan)
    modes, tasks = tuple(plan.modes), {task.id: task for task in plan.tasks}
    size = 1 if plan.batch_size == 1 else BLOCK * plan.batch_size
    seen = results.read(folder)[0] if plan.interval else {}
    began = time.monotonic()
    with Progress("decoding", len(wanted) * len(modes)) as progress:
        for number, block in enumerate(wanted[first : first + size] for first in range(0, len(wanted), size)):
            if plan.interval and metrics.narrow(metrics.widest_interval(seen), plan.interval):
                break
            if number and (now := time.monotonic()) + (now - began) / number > plan.until:
                break
            written: dict[WorkUnit, list[tuple[Line, list[Line]]]] = {unit: [] for unit in block}
            skipped: dict[WorkUnit, TooLong] = {}
            turn = plan.units.index(block[0]) // size % len(modes)
            plan.begin_round(False)
            try:
                for mode in sorted((*modes[turn:], *modes[:turn]), key=lambda mode: mode != plan.first):
                    progress.show(f"{block[0].task} {mode}")
                    talks = [Conversation(unit, tasks[unit.task], plan) for unit in block if unit not in skipped]
                    for key, prompt, text in _written(plan, talks, mode, progress, skipped):
                        completion = tasks[key.task].completion(text.text)
                        seen.setdefault(mode, {})[key] = text
                        sample = results.sample_line(key, mode, prompt, text, completion)
                        written[WorkUnit(*key[:3])].append((sample, results.pass_lines(key, mode, text)))
                        progress.advance(1 / tasks[key.task].turns)
            finally:  # also where somebody has enough: what is finished is kept
                whole = [some for unit, some in written.items() if len(some) == plan.texts[unit.task]]
                if whole:
                    samples, passes = zip(*(both for some in whole for both in some), strict=True)
                    results.append(folder, samples, [line for some in passes for line in some])
                results.skip(folder, {unit: error.line for unit, error in skipped.items()})
            for some in seen.values():
                for key in [key for key in some if WorkUnit(*key[:3]) in skipped]:
                    del some[key]


def _warm_up(plan: Plan) -> None:
    """Every mode writes a few tokens that nobody records or remembers: first forwards are slow."""
    plan.begin_round(False)
    few = min(WARM_UP_TOKENS, plan.params.max_new_tokens)
    warm = replace(plan.params, max_new_tokens=few, min_tokens=min(few, plan.params.min_tokens or 0))
    for mode, decode in plan.modes.items():
        decode(plan.tasks[0].prompt(()), warm, False)
        if plan.batch_size > 1 and mode in plan.writers:
            tasks = plan.tasks[: plan.batch_size]
            deque(plan.writers[mode](GenerationRequest(task.prompt(()), warm) for task in tasks), maxlen=0)
    plan.begin_round(True)


Text = tuple[SampleKey, Sequence[int], GenerationStats]  # which it is, its prompt, and what happened


@dataclass(frozen=True)
class Conversation:
    """One work unit in one mode: turn by turn, each after the answers before it."""

    unit: WorkUnit
    task: Task
    plan: Plan

    def request(self, answers: Sequence[str], after: GenerationRequest | None = None) -> GenerationRequest:
        """Its next turn; each sample has a seed of its own. Raises `TooLong` where that has no room."""
        params, limit = self.plan.params, self.plan.limit
        assert params.seed is not None, "an evaluation says which"
        prompt = self.task.prompt(answers)
        if len(prompt) + params.max_new_tokens > limit:
            raise TooLong(self.task.id, len(answers), len(prompt), params.max_new_tokens, limit)
        return GenerationRequest(prompt, replace(params, seed=params.seed + self.unit.sample), after)

    def alone(self, decode: Decoder, meter: EnergyMeter | None = None) -> Iterator[Text]:
        """All its turns, one after the other."""
        answers: list[str] = []
        for turn in range(self.task.turns):
            request = self.request(answers)
            before = meter.joules() if meter else None
            text = decode(request.prompt, request.params, turn > 0)  # type: ignore[arg-type]  # tokens, of a task
            if meter and before is not None and (after := meter.joules()) is not None:
                text = replace(text, energy_j=after - before)
            answers.append(text.text)
            yield SampleKey(*self.unit, turn), request.prompt, text  # type: ignore[misc]


def _written(
    plan: Plan, talks: Sequence[Conversation], mode: str, progress: Progress, skipped: dict[WorkUnit, TooLong]
) -> Iterator[Text]:
    """The texts of a block in one mode: side by side where the mode can. What proves too long is put into `skipped`, or
    raised."""

    def skip(talk: Conversation, error: TooLong) -> None:
        if not plan.skip_too_long:
            raise error
        skipped[talk.unit] = error

    if plan.batch_size > 1 and mode in plan.writers:
        yield from _side_by_side(talks, plan.writers[mode], ProgressLine(progress, mode), skip)
        return
    for talk in talks:
        try:
            yield from talk.alone(plan.modes[mode], plan.meter)
        except TooLong as error:
            skip(talk, error)


def _side_by_side(
    talks: Sequence[Conversation], write: Writer, line: ProgressLine, skip: Callable[[Conversation, TooLong], None]
) -> Iterator[Text]:
    """The next turn of a conversation goes before those that have not begun, into the slot that it had."""
    queue = deque(talk.request(()) for talk in talks)
    under_way: dict[GenerationRequest, tuple[Conversation, list[str]]] = {
        request: (talk, []) for request, talk in zip(queue, talks, strict=True)
    }
    left = sum(talk.task.turns for talk in talks)
    followed: set[GenerationRequest] = set()  # the engine's thread may be further than what it has said

    def requests() -> Iterator[GenerationRequest | None]:
        given = 0
        while given < left:
            given += bool(queue)
            yield queue.popleft() if queue else None

    jobs = list(queue) if left == len(talks) else requests()  # a list need not wait for anybody
    for request, news in write(jobs):
        talk, answers = under_way[request]
        if isinstance(news, Generation):
            if news.error:
                raise news.error
            line.over(request)
            yield SampleKey(*talk.unit, len(answers)), request.prompt, news.stats  # type: ignore[misc]
            continue
        line.said(request, talk.unit.task, news)
        assert request.sequence is not None
        if request.sequence.stopper.finish and len(answers) + 1 < talk.task.turns and request not in followed:
            followed.add(request)
            answers = [*answers, request.sequence.stopper.text]
            try:
                queue.appendleft(talk.request(answers, after=request))
                under_way[queue[0]] = talk, answers
            except TooLong as error:
                skip(talk, error)
                left -= talk.task.turns - len(answers)


def summary(
    engine: Engine,
    plan: Plan,
    config: dict[str, Any],
    runs: Mapping[str, metrics.Runs],
    skipped: Sequence[Line] = (),
    starts: Sequence[Line] = (),
) -> dict[str, Any]:
    """`summary.json`, with None for what a caller fills in later (scores). `skipped`: lines of what was too long."""
    if not all(runs.get(mode) for mode in plan.modes):
        raise UsageError(f"No text was written to the end; {len(skipped)} proved too long: lower --max-new-tokens.")
    tasks, runs = {task.id: task for task in plan.tasks}, {mode: runs[mode] for mode in plan.modes}
    modes = metrics.summarise(runs, lambda key: tasks[key.task].category)
    for mode, figures in modes.items():
        if plan.params.rejection:  # the text depends on the drafter there; only its distribution is the target's
            for some in (figures, *(figures["by_category"] or {}).values()):
                some["identical_to_ar"] = None
        elif ar := runs.get("ar"):
            figures["first_divergence_gaps"] = [
                engine.top_two_gap([*tasks[key.task].prompt(_before(ar, key)), *ar[key].tokens[:index]])
                for key, index in metrics.divergences(runs[mode], ar)
            ]
    if any(task.repeats for task in plan.tasks):
        cut = repeats.left_out(runs, _repeats(tasks), engine.decode)
        for mode, figures in metrics.summarise(cut).items():
            modes[mode]["without_repeats"] = {name: figures[name] for name in metrics.BY_CATEGORY if name != SAME}
    events = [asdict(event) for event in engine.events]
    return {
        "config": config,
        "sampling": asdict(plan.params),
        "not_applied": engine.defaults.not_applied(plan.params),
        "environment": environment(engine),
        "memory": "warm" if engine.config.memory else "cold",
        "events": events,
        "starts": list(starts),
        "problems": len({key.task for texts in runs.values() for key in texts}),
        "widest_interval": (widest := metrics.widest_interval(runs)),
        "left": (rest := left(plan, runs, skipped)),
        "unfinished": 0 if metrics.narrow(widest, plan.interval) else rest,
        "skipped_too_long": len({line["task_id"] for line in skipped}),
        "skipped": list(skipped),
        "modes": modes,
    }


def left(plan: Plan, runs: Mapping[str, metrics.Runs], skipped: Sequence[Line]) -> int:
    """Work units that were neither decoded nor too long."""
    done = {WorkUnit(*key[:3]) for texts in runs.values() for key in texts}
    long = {WorkUnit(line["task_id"], line["sample"], line["repeat"]) for line in skipped if "sample" in line}
    return sum(unit not in done and unit not in long for unit in plan.units)


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


def _repeats(tasks: Mapping[str, Task]) -> Callable[[SampleKey, str], tuple[int, int]]:
    def span(key: SampleKey, text: str) -> tuple[int, int]:
        found = tasks[key.task].repeats
        return found(text) if found else (0, 0)

    return span


def _before(runs: metrics.Runs, key: SampleKey) -> list[str]:
    """The answers of the turns before this one."""
    return [runs[key._replace(turn=turn)].text for turn in range(key.turn)]
