"""What the command line of an evaluation asks for, checked as far as that goes without a model. No torch here."""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pearl.checkpoints.drafts import kinds as draft_kinds
from pearl.config import cli
from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import Pair
from pearl.core.params import NEUTRAL, SamplingParams
from pearl.core.schedule import Schedule
from pearl.errors import UsageError
from pearl.machine import launcher
from pearl.options import FLAG, PATH, Option, choice, number, whole
from pearl.tasks.benchmark import Benchmark
from pearl.tasks.prompts import FORMATS

EXAMPLES = ("--limit 10", "--pair qwen2.5-0.5b-7b --mode ar sd pearl tree", "--output results/mine --resume")
TASK = (
    Option("format", None, choice(*FORMATS), "how to ask; default: the pair's, or chat if the model has it", "task"),
    Option("data", None, PATH, "the problems in their original format; default: fetched or shipped", "task"),
    Option("share", 1.0, number(1e-9, 1.0, "above 0 and at most 1"), "only the first part of each category", "task"),
    Option("no_score", False, FLAG, "do not judge the answers", "task"),
    Option("repeats", 1, whole(1), "how often to do all of it, for narrower intervals", "task"),
    Option("resume", False, FLAG, "go on with the run in --output, if one was begun there", "task"),
    Option(
        "skip_too_long", False, FLAG, "leave out problems that are too long, instead of ending with an error", "task"
    ),
    Option(
        "stop_at_interval",
        None,
        number(0.001, 1.0, "a part of a speed-up, from 0.001 to 1"),
        "stop once the interval of every speed-up is at most so wide; problems come in a mixed order then",
        "task",
    ),
    Option(
        "seconds",
        None,
        number(0, math.inf, "a number of seconds"),
        "begin no problem that will end later, one at least; --resume goes on",
        "task",
    ),
    Option("wide", False, FLAG, "print more columns of the table", "task"),
)


@dataclass(frozen=True)
class EvalConfig:
    benchmark: Benchmark
    found: argparse.Namespace
    words: tuple[str, ...]  # of the command line, after its name
    engine: EngineConfig
    pair: Pair | None
    schedules: dict[str, Schedule]
    baselines: tuple[str, ...]
    params: SamplingParams
    problems: list[Any]
    folder: Path
    until: float = math.inf  # of `time.monotonic`, see --seconds

    @property
    def asked(self) -> dict[str, Any]:
        """As the files of the run keep it. `problems`: a digest, as one option may name data that has changed."""
        problems = hashlib.sha256(repr(self.problems).encode()).hexdigest()[:16]
        told = {"suite": self.benchmark.name, "problems": problems, "resolved": vars(self.engine)}
        return vars(self.found) | told

    def title(self, summary: Mapping[str, Any]) -> str:
        """Of the table."""
        engine, skipped = self.engine, summary.get("skipped_too_long", 0)
        count = summary.get("problems", len(self.problems) - skipped)
        problems = f"{count} problem{'s' * (count != 1)}" + (f" ({skipped} too long, skipped)" if skipped else "")
        label = ", SYNTHETIC acceptance" * bool(engine.synthetic) + ", warm memory" * bool(engine.memory)
        return f"{self.benchmark.title}, {problems}, {engine.target} <- {engine.draft}, {engine.dtype}{label}"

    @property
    def to_go_on(self) -> str:
        """The command that goes on with this run after an interruption, as far as this process knows it."""
        more = [] if self.found.resume else ["--resume"]
        if not any(word.partition("=")[0] == "--output" for word in self.words):
            more = ["--output", str(self.folder), *more]
        if launcher.started() > 1:
            return f"the same command and {shlex.join(more)}" if more else "the same command"
        return shlex.join(["pearl", *command(self.benchmark).split(), *self.words, *more])


def command(benchmark: Benchmark) -> str:
    return f"eval {benchmark.name.replace('_', '-')}"


def parser(benchmark: Benchmark) -> cli.Parser:
    tokens = benchmark.max_new_tokens
    made = cli.parser(
        command(benchmark), *EXAMPLES, max_new_tokens=tokens, baselines=cli.BASELINES, about=benchmark.description
    )
    # A run can be repeated, and compared with that of another checkpoint: nothing is left to chance or to its defaults.
    made.set_defaults(seed=0, **{name: value for name, value in NEUTRAL.items() if name in made.options})
    return made.take(TASK)


def read(benchmark: Benchmark, argv: Sequence[str] | None) -> EvalConfig:
    """Raises `UsageError` for what can't be done."""
    began, words = time.monotonic(), tuple(sys.argv[1:] if argv is None else argv)
    found = cli.parse(parser(benchmark), words)
    config, pair = cli.engine_config(found)
    schedules, params = cli.schedules(found, cli.BASELINES), cli.sampling(found).with_defaults()
    baselines = tuple(mode for mode in found.mode if mode in cli.BASELINES)
    if baselines and not params.greedy:
        raise UsageError(f"{baselines[0]} draws its samples in its own way and can't be compared: use --temperature 0.")
    plain = SamplingParams(max_new_tokens=params.max_new_tokens, ignore_eos=params.ignore_eos, **NEUTRAL)
    if baselines and replace(params, seed=None, method=plain.method) != plain:
        raise UsageError(
            f"{baselines[0]} is measured without penalties and other rules: leave them out, or leave it out."
        )
    if "hf-assisted" in baselines and not (
        config.draft_has_files and draft_kinds.is_causal_lm(config.draft_checkpoint)
    ):
        raise UsageError("hf-assisted needs a draft model: name one with --draft, or use hf-prompt-lookup.")
    if baselines:  # they read every prompt afresh
        if config.prefix_cache_gb:
            raise UsageError(f"{baselines[0]} has no cache of prompts: leave --prefix-cache out, or {baselines[0]}.")
        config = replace(config, prefix_cache_gb=0.0)
    if params.rejection and config.synthetic and any(one.drafts for one in schedules.values()):
        raise UsageError("A synthetic draft knows the text of a seed: leave --sampling rejection out.")
    for mode in found.mode:
        config.check_mode(mode)
    if found.stop_at_interval and (found.mode == ["ar"] or "ar" not in found.mode):
        raise UsageError("--stop-at-interval is about speed-ups over ar: name ar and another --mode.")
    if found.max_sequences and found.batch_size > found.max_sequences:
        raise UsageError(
            f"--batch-size {found.batch_size} is more than --max-sequences {found.max_sequences}: raise the latter, or "
            "leave it out."
        )
    if found.resume and not found.output:
        raise UsageError("--resume needs --output, the folder of the run that is to go on.")
    problems = choose(benchmark, benchmark.problems(found.data), found)
    folder = Path(found.output or time.strftime(f"results/{benchmark.name}-%Y%m%d-%H%M%S"))
    until = began + (math.inf if found.seconds is None else found.seconds)
    return EvalConfig(benchmark, found, words, config, pair, schedules, baselines, params, problems, folder, until)


def choose(benchmark: Benchmark, problems: list[Any], found: argparse.Namespace) -> list[Any]:
    """The problems to run: of those that --indices names a share of each category, and of that the first --limit."""
    problems = [problems[i] for i in cli.choose(len(problems), found.indices)]
    kind = benchmark.kind or benchmark.category
    sizes = Counter(map(kind, problems))
    seen: Counter[str | None] = Counter()
    shared = []
    for problem in problems:
        own = kind(problem)
        seen[own] += 1
        if seen[own] <= math.ceil(round(found.share * sizes[own], 9)):
            shared.append(problem)
    if found.stop_at_interval:
        shared = _mixed(benchmark, shared)
    return shared[: found.limit]


def _mixed(benchmark: Benchmark, problems: list[Any]) -> list[Any]:
    """In an order by chance, the same every time, in which each category has its share from the beginning (those of one
    size take turns): so that the first of them are a fair sample of all."""
    drawn = list(problems)
    random.Random(0).shuffle(drawn)
    sizes = Counter(map(benchmark.category, drawn))
    place: Counter[str | None] = Counter()
    turns = []
    for problem in drawn:
        category = benchmark.category(problem)
        turns.append(((place[category] + 0.5) / sizes[category], problem))
        place[category] += 1
    return [problem for _, problem in sorted(turns, key=lambda turn: turn[0])]
