"""The one `main` of all evaluation scripts: a suite's problems, decoded in several modes at once and scored.

From the command line to the files of a run (`pearl.results`). Which problems there are, how they are asked and what an
answer is worth is the suite's business (`pearl.tasks`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pearl import cli
from pearl.config import NGRAM, one_of
from pearl.errors import UsageError
from pearl.sampling import SamplingParams
from pearl.tasks.prompts import FORMATS
from pearl.tasks.suite import Suite


def parser(suite: Suite) -> cli.Parser:
    made = cli.parser(suite.description, suite.max_new_tokens, cli.BASELINES)
    task = made.add_argument_group("the task")
    task.add_argument("--format", help=f"{' or '.join(FORMATS)}; default: the pair's, or chat if the model has it")
    task.add_argument(
        "--data", metavar="FILE", help=f"{suite.title} in its original format; default: fetched or shipped"
    )
    task.add_argument("--share", type=float, default=1.0, help="only the first part of each category, like 0.1")
    task.add_argument("--no-score", action="store_true", help="do not judge the answers")
    task.add_argument("--repeats", type=int, default=1, help="how often to do all of it, for narrower intervals")
    task.add_argument("--resume", action="store_true", help="go on with the run in --output, if one was begun there")
    return made


def main(suite: Suite, argv: Sequence[str] | None) -> int:
    found = cli.parse(parser(suite), argv)
    config, pair = cli.engine_config(found)
    one_of("format", found.format, (*FORMATS, None))
    schedules, params = cli.schedules(found, cli.BASELINES), cli.sampling(found)
    baselines = [mode for mode in found.mode if mode in cli.BASELINES]
    _check_baselines(baselines, params, config.draft)
    cli.at_least_one("--num-samples", found.num_samples)
    cli.at_least_one("--repeats", found.repeats)
    if found.resume and not found.output:
        raise UsageError("--resume needs --output, the folder of the run that is to go on.")
    problems = choose(suite, suite.load(found.data), found)
    folder = Path(found.output or time.strftime(f"results/{suite.name}-%Y%m%d-%H%M%S"))
    asked = vars(found) | {"suite": suite.name, "resolved": vars(config)}

    from rich.console import Console  # from here on slow imports: everything that can be refused has been

    from pearl import harness, results
    from pearl.engine import Engine, count_processes
    from pearl.loading import preflight
    from pearl.process import World
    from pearl.replicas import Team, place

    world, console = World.here(), Console(width=None if sys.stdout.isatty() else 140)
    title = f"{suite.title}, {len(problems)} problems, {config.target} <- {config.draft}, {config.dtype}"
    summary = results.ended(folder, asked) if found.resume else None
    if summary is None:
        schedule = cli.hardest(schedules.values())
        count_processes(schedule, found.processes, world)
        checked = preflight(place(config, world))
        form = found.format or (pair.prompt if pair else "chat" if checked.tokenizer.chat_template else "completion")
        if form == "completion" and not params.ignore_eos:
            params = replace(params, stop=suite.stop)
        tasks = tuple(_task(suite, problem, form, checked.tokenizer) for problem in problems)
        for task in tasks:
            checked.check_prompt(task.prompt([""] * (task.turns - 1)), task.turns * params.max_new_tokens)
        with Engine(checked.config, schedule, found.processes, checked) as engine:  # rank 1 stays in here
            console.print(engine.description, highlight=False)
            modes = harness.decoders(engine, schedules)
            if baselines:
                from pearl.baselines import Baselines

                modes |= Baselines(engine, checked).decoders(baselines)
            plan = harness.Plan(
                tasks, {mode: modes[mode] for mode in found.mode}, params, found.num_samples, found.repeats
            )
            team = Team(world)
            asked |= {"prompt_format": form, "prompts": plan.digest}
            if not _decode(plan, team, folder, asked, console):
                return 1
            if team.first:
                summary = harness.summary(engine, plan, asked, results.read(folder)[0])
            team.leave()
        if summary:
            _judge(suite, problems, folder, summary, found.no_score)
    if world.rank == world.replica == 0:
        console.print(harness.table(summary["modes"], title))
        console.print(f"written to {folder}", highlight=False)
    return 0


def choose(suite: Suite, problems: list[Any], found: argparse.Namespace) -> list[Any]:
    """The problems to run: a share of each category, and of those what --limit and --indices leave."""
    if not 0 < found.share <= 1:
        raise UsageError(f"--share must be above 0 and at most 1, not {found.share}.")
    sizes = Counter(map(suite.category, problems))
    seen: Counter[str | None] = Counter()
    shared = []
    for problem in problems:
        category = suite.category(problem)
        seen[category] += 1
        if seen[category] <= math.ceil(found.share * sizes[category]):
            shared.append(problem)
    return [shared[i] for i in cli.choose(len(shared), found.limit, found.indices)]


def _check_baselines(baselines: Sequence[str], params: SamplingParams, draft: str) -> None:
    if baselines and not params.greedy:
        raise UsageError(f"{baselines[0]} draws its samples in its own way and can't be compared: use --temperature 0.")
    if "hf-assisted" in baselines and draft == NGRAM:
        raise UsageError("hf-assisted needs a draft model: name one with --draft, or use hf-prompt-lookup.")


def _task(suite: Suite, problem: Any, form: str, tokenizer: Any) -> Any:
    from pearl.harness import Task

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


def _decode(plan: Any, team: Any, folder: Path, asked: Mapping[str, Any], console: Any) -> bool:
    """All rounds that are not there yet, shared among the replicas. False if some are missing after that."""
    from pearl import harness, results

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
    except Exception as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    failures = team.finish(failure)
    if team.first:
        results.merge(folder, plan.rounds)
        for name, reason in failures.items():
            print(f"error: {name} failed ({reason}); what it left is done with --resume.", file=sys.stderr)
    if failures:
        team.leave()
    return not failures


def _judge(suite: Suite, problems: Sequence[Any], folder: Path, summary: dict[str, Any], no_score: bool) -> None:
    """Scores each mode's answers and writes what other tools read; then the summary, which ends the run."""
    from pearl import results

    texts, completions = results.read(folder)
    for mode, figures in summary["modes"].items():
        if suite.score and not no_score:
            first = [(key.task, one) for key, one in completions[mode].items() if key.repeat == key.turn == 0]
            figures |= suite.score(problems, first)
        if suite.export:
            talks: dict[str, list[list[Any]]] = {}
            for key, text in texts[mode].items():
                if key.repeat == 0:
                    samples = talks.setdefault(key.task, [])
                    samples.append([text]) if key.turn == 0 else samples[-1].append(text)
            name = f"{Path(summary['config']['resolved']['target']).name}-{mode.replace(':', '-')}"
            results.write_lines(folder / "model_answer" / f"{name}.jsonl", suite.export(problems, talks, name))
    results.write(folder / results.SUMMARY, summary)
