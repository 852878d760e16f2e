"""The one `main` of all evaluation scripts: a suite's problems, decoded in several modes at once and scored.

From the command line to the files of a run (`pearl.evaluation.results`). Which problems there are, how they are asked
and what an answer is worth is the suite's business (`pearl.tasks`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pearl.config import cli, launch
from pearl.config.engine_config import NGRAM, EngineConfig
from pearl.config.pairs import Pair
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.errors import UsageError
from pearl.options import FLAG, TEXT, choice, number, option, whole
from pearl.tasks.prompts import FORMATS
from pearl.tasks.suite import Suite

EXAMPLES = ("--limit 10", "--pair qwen2.5-0.5b-7b --mode ar sd pearl tree", "--output results/mine --resume")


TASK = (
    option("format", None, choice(*FORMATS), "how to ask; default: the pair's, or chat if the model has it", "task"),
    option("data", None, TEXT, "the problems in their original format; default: fetched or shipped", "task"),
    option("share", 1.0, number(1e-9, 1.0, "above 0 and at most 1"), "only the first part of each category", "task"),
    option("no_score", False, FLAG, "do not judge the answers", "task"),
    option("repeats", 1, whole(1), "how often to do all of it, for narrower intervals", "task"),
    option("resume", False, FLAG, "go on with the run in --output, if one was begun there", "task"),
)


def parser(suite: Suite) -> cli.Parser:
    return cli.parser(
        f"eval {suite.name.replace('_', '-')}",
        *EXAMPLES,
        max_new_tokens=suite.max_new_tokens,
        baselines=cli.BASELINES,
        about=suite.description,
    ).take(TASK)


@dataclass(frozen=True)
class Order:
    """What a command line asks for, checked as far as that goes without a model."""

    suite: Suite
    found: argparse.Namespace
    config: EngineConfig
    pair: Pair | None
    schedules: dict[str, Schedule]
    baselines: tuple[str, ...]
    params: SamplingParams
    problems: list[Any]
    folder: Path

    @property
    def asked(self) -> dict[str, Any]:
        """As the files of the run keep it."""
        return vars(self.found) | {"suite": self.suite.name, "resolved": vars(self.config)}

    @property
    def title(self) -> str:
        config = self.config
        return f"{self.suite.title}, {len(self.problems)} problems, {config.target} <- {config.draft}, {config.dtype}"


def order(suite: Suite, argv: Sequence[str] | None) -> Order:
    found = cli.parse(parser(suite), argv)
    config, pair = cli.engine_config(found)
    schedules, params = cli.schedules(found, cli.BASELINES), cli.sampling(found)
    baselines = tuple(mode for mode in found.mode if mode in cli.BASELINES)
    if baselines and not params.greedy:
        raise UsageError(f"{baselines[0]} draws its samples in its own way and can't be compared: use --temperature 0.")
    if "hf-assisted" in baselines and (config.draft == NGRAM or config.feature_folder):
        raise UsageError("hf-assisted needs a draft model: name one with --draft, or use hf-prompt-lookup.")
    for mode in found.mode:
        config.check_mode(mode)
    if found.resume and not found.output:
        raise UsageError("--resume needs --output, the folder of the run that is to go on.")
    problems = choose(suite, suite.load(found.data), found)
    folder = Path(found.output or time.strftime(f"results/{suite.name}-%Y%m%d-%H%M%S"))
    return Order(suite, found, config, pair, schedules, baselines, params, problems, folder)


def main(suite: Suite, argv: Sequence[str] | None) -> int:
    asked = order(suite, argv)
    if note := launch.note():
        print(note, file=sys.stderr)

    from rich.console import Console  # from here on slow imports: everything that can be refused has been

    from pearl.evaluation import harness, results
    from pearl.parallel.world import World

    world, console = World.here(asked.config.tensor_parallel_size), Console(width=None if sys.stdout.isatty() else 140)
    summary = results.ended(asked.folder, asked.asked) if asked.found.resume else None
    if summary is None:
        summary, failed = _decode(asked, world, console)
        if failed:
            return 1
        if summary is not None:
            _judge(asked, summary)
    if summary is not None and world.rank == world.replica == world.tp_rank == 0:
        console.print(harness.table(summary["modes"], asked.title))
        console.print(f"written to {asked.folder}", highlight=False)
    return 0


def choose(suite: Suite, problems: list[Any], found: argparse.Namespace) -> list[Any]:
    """The problems to run: a share of each category, and of those what --limit and --indices leave."""
    sizes = Counter(map(suite.category, problems))
    seen: Counter[str | None] = Counter()
    shared = []
    for problem in problems:
        category = suite.category(problem)
        seen[category] += 1
        if seen[category] <= math.ceil(found.share * sizes[category]):
            shared.append(problem)
    return [shared[i] for i in cli.choose(len(shared), found.limit, found.indices)]


def _task(suite: Suite, problem: Any, form: str, tokenizer: Any) -> Any:
    from pearl.evaluation.harness import Task

    def prompt(answers: Sequence[str]) -> tuple[int, ...]:
        text = suite.prompt(problem, answers, form, tokenizer)
        return tuple(tokenizer(text, add_special_tokens=form != "chat").input_ids)

    return Task(
        suite.identify(problem),
        prompt,
        lambda text: suite.completion(problem, text, form),
        suite.turns(problem),
        suite.category(problem),
    )


def _decode(order: Order, world: Any, console: Any) -> tuple[dict[str, Any] | None, bool]:
    """The summary, in the first replica, and whether something is missing because a replica failed."""
    from pearl.checkpoints.preflight import preflight
    from pearl.engine import Engine
    from pearl.evaluation import harness, results
    from pearl.parallel.launch import count_processes, launch
    from pearl.parallel.replicas import Team, place

    found, suite, params = order.found, order.suite, order.params
    schedule = cli.hardest(order.schedules.values())
    count_processes(schedule, found.processes, world)
    checked = preflight(place(order.config, world), world.roles, world.local_tp_size)
    form = found.format or (
        order.pair.prompt
        if order.pair and order.pair.prompt
        else "chat"
        if checked.tokenizer.chat_template
        else "completion"
    )
    if form == "completion" and not params.ignore_eos:
        params = replace(params, stop=suite.stop)
    tasks = tuple(_task(suite, problem, form, checked.tokenizer) for problem in order.problems)
    for task in tasks:
        checked.check_prompt(task.prompt([""] * (task.turns - 1)), task.turns * params.max_new_tokens)
    with Engine(launch(checked.config, schedule, found.processes, checked)) as engine:  # rank 1 stays in here
        console.print(engine.description, highlight=False)
        modes = harness.decoders(engine, order.schedules)
        if order.baselines:
            from pearl.evaluation.baselines import Baselines

            modes |= Baselines(engine, checked).decoders(order.baselines)
        modes = {mode: modes[mode] for mode in found.mode}
        size = min(found.batch_size, engine.model.batch_slots)
        side_by_side = harness.writers(engine, order.schedules, size)
        plan = harness.Plan(tasks, modes, params, found.num_samples, found.repeats, side_by_side, size)
        asked = order.asked | {"prompt_format": form, "prompts": plan.digest}
        team, summary = Team(world), None
        failed = not _complete(plan, team, order.folder, asked, console)
        if team.first and not failed:
            summary = harness.summary(engine, plan, asked, results.read(order.folder)[0])
        team.leave()
    return summary, failed


def _complete(plan: Any, team: Any, folder: Path, asked: Mapping[str, Any], console: Any) -> bool:
    """Decodes all rounds that are not there yet, shared among the replicas. False if some are missing after that."""
    from pearl.evaluation import harness, results

    def missing() -> list[list[Any]]:
        results.begin(folder, asked)
        done = results.repair(folder, plan.texts)
        return [list(one) for one in plan.rounds if one not in done]

    rounds = [results.Round(*one) for one in team.share(team.prepare(missing))]
    if team.alone:
        harness.run(plan, folder, console, rounds)
        results.merge(folder, plan.rounds)  # those of replicas before it
        return True
    failure = ""
    try:
        harness.run(plan, folder / team.name, console, rounds)
    except Exception as error:  # whatever it is, the others go on
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    failures = team.finish(failure)
    if team.first:
        results.merge(folder, plan.rounds)
        for name, reason in failures.items():
            print(f"error: {name} failed ({reason}); what it left is done with --resume.", file=sys.stderr)
    return not failures


def _judge(order: Order, summary: dict[str, Any]) -> None:
    """Scores each mode's answers and writes what other tools read; then the summary, which ends the run."""
    from pearl.evaluation import results

    suite, problems = order.suite, order.problems
    texts, completions = results.read(order.folder)
    for mode, figures in summary["modes"].items():
        if suite.score and not order.found.no_score:
            first = [(key.task, one) for key, one in completions[mode].items() if key.repeat == key.turn == 0]
            figures |= suite.score(problems, first)
        if suite.export:
            talks: dict[str, list[list[Any]]] = {}
            for key, text in texts[mode].items():
                if key.repeat == 0:
                    samples = talks.setdefault(key.task, [])
                    samples.append([text]) if key.turn == 0 else samples[-1].append(text)
            name = f"{Path(order.config.target).name}-{mode.replace(':', '-')}"
            results.write_lines(order.folder / "model_answer" / f"{name}.jsonl", suite.export(problems, talks, name))
    results.write(order.folder / results.SUMMARY, summary)
