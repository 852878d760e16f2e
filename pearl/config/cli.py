"""The command line that all evaluation scripts share: a pair, a machine, modes, sampling. No torch here.

A YAML file (`--config`) may hold any of these options by their long names; what stands on the command line wins.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from pearl.config.engine_config import (
    DEADLINE_S,
    DTYPES,
    EMBEDDED,
    LOADS,
    SILENCE_S,
    START_TIMEOUT_S,
    EngineConfig,
    refuse_unknown,
)
from pearl.config.inputs import brief, parse_yaml, read_text
from pearl.config.pairs import Pair, load_pair
from pearl.core.sampling import METHODS, SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.errors import UsageError

BASELINES = ("hf-assisted", "hf-prompt-lookup")  # transformers' own ways, beside ours: pearl.evaluation.baselines


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def parser(description: str, max_new_tokens: int, baselines: Sequence[str] = ()) -> Parser:
    made = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = made.add_argument
    add("--config", metavar="FILE", help="a YAML file with any of these options")

    pair = made.add_argument_group("the pair")
    pair.add_argument(
        "--pair",
        metavar="NAME",
        help="of the registry (python -m pearl.config.pairs), or a YAML file; default: smollm2-135m",
    )
    pair.add_argument("--target", help="hub id, folder or GGUF file; default: the embedded SmolLM2-135M-Instruct")
    pair.add_argument("--draft", help="hub id, folder, GGUF file, feature:FOLDER, or ngram")
    pair.add_argument("--dtype", help=f"of the target: {', '.join(DTYPES)}; default: the pair's, or bfloat16")
    pair.add_argument("--draft-dtype", help="default: as the target's")
    pair.add_argument("--load-in", help=f"{' or '.join(LOADS)}: quantize the target through bitsandbytes")
    pair.add_argument("--draft-load-in", help="the same for the draft")
    pair.add_argument("--double-quant", action="store_true", help="quantize the constants of 4-bit weights too")
    pair.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    pair.add_argument("--max-length", type=int, default=4096, help="tokens of a text, prompt included")
    pair.add_argument("--max-sequences", type=int, help="texts side by side that there is memory for; default: a batch")
    pair.add_argument("--cache-gb", type=float, default=0.0, help="of their keys and values at most; 0: no limit")

    machine = made.add_argument_group("the machine")
    machine.add_argument("--target-device", default="auto", help="cpu, cuda:0, or several: cuda:0,cuda:1")
    machine.add_argument(
        "--target-tp", type=int, default=1, metavar="N", help="spread every matrix of the target over N ranks"
    )
    machine.add_argument("--draft-device", default="auto", help="the last GPU by default")
    machine.add_argument("--target-cores", help="on CPU, like 0-3; default: half of them")
    machine.add_argument("--draft-cores", help="on CPU; default: the others")
    machine.add_argument("--kernel", default="auto", help="linear layers on CPU: auto, stock or packed")
    machine.add_argument(
        "--draft-kernel",
        default="auto",
        help="the same for the drafter, or int8: rounded weights; auto rounds those of distilled ones",
    )
    machine.add_argument(
        "--draft-vocabulary", type=int, default=0, help="frequent tokens to draft from; 0: all, or the model's own"
    )
    machine.add_argument("--draft-beam", type=int, default=0, help="paths a feature drafter keeps; 1: a chain, 0: auto")
    machine.add_argument("--eager", action="store_true", help="on a GPU: run forwards without CUDA graphs")
    machine.add_argument("--static", default="auto", help="forwards of fixed shapes: on, off, or auto: on a GPU")
    machine.add_argument(
        "--feature-lane",
        default="auto",
        help="features go from device to device: on, off (through the host), or auto: between GPUs",
    )
    machine.add_argument(
        "--draft-deadline-s", type=float, default=DEADLINE_S, help="wait so long beyond a pass for a silent drafter"
    )
    machine.add_argument(
        "--silence-s", type=float, default=SILENCE_S, help="no sign of life for so long: the other side is dead"
    )
    machine.add_argument(
        "--start-timeout-s", type=float, default=START_TIMEOUT_S, help="the other side may take so long to come"
    )
    machine.add_argument("--draft-restarts", type=int, default=3, help="start a lost drafter anew so many times")
    machine.add_argument("--processes", type=int, help="1: ar and sd in one process; default: as many as needed")

    run = made.add_argument_group("the run")
    run.add_argument(
        "--mode",
        nargs="+",
        default=["ar", "pearl"],
        help=f"one or several of {', '.join((*MODES, *baselines))}; sd:3 is sd with gamma 3",
    )
    run.add_argument("--gamma", default="auto", help="guesses a block, or auto")
    run.add_argument("--branches", default="auto", help="tree: rows of one drafter forward, or auto")
    run.add_argument("--width", default="auto", help="rows of a target pass at most, or auto")
    run.add_argument("--max-ahead", default="auto", help="how far a free-running drafter may guess ahead, or auto")
    run.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    run.add_argument("--ignore-eos", action="store_true", help="write --max-new-tokens, whatever would end a text")
    run.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    run.add_argument("--top-k", type=int, default=0)
    run.add_argument("--top-p", type=float, default=1.0)
    run.add_argument("--min-p", type=float, default=0.0)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--sampling", default="seeded", help=f"{' or '.join(METHODS)}, for a temperature above 0")
    run.add_argument("--num-samples", type=int, default=1, help="texts a problem, with the seeds from --seed on")
    run.add_argument("--limit", type=int, help="only the first so many problems")
    run.add_argument("--indices", help="only these problems, like 0,3,10-20")
    run.add_argument("--batch-size", type=int, default=1, help="texts decoded side by side")
    run.add_argument("--trace", metavar="FILE", help="write both processes' timeline (Chrome trace format)")
    run.add_argument("--output", metavar="DIR", help="default: a new folder under results/")
    return made


def parse(made: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, those of a `--config` file under those of the command line."""
    found = made.parse_args(argv)
    if found.config:
        made.set_defaults(**_yaml(found.config, made))
        found = made.parse_args(argv)
    found.mode = [mode for word in found.mode for mode in word.split(",") if mode]
    return found


def _yaml(path: str, made: Parser) -> dict[str, Any]:
    """The values of a config as their options would have made them of words of the command line."""
    where = f"The config {brief(path)}"
    values = parse_yaml(read_text(path, "The config"), where)
    values = {key.replace("-", "_"): value for key, value in values.items()}
    options = {action.dest: action for action in made._actions if action.dest not in ("help", "config")}
    refuse_unknown(values, list(options), path)
    return {key: _default(options[key], value, f"{where}: {key}") for key, value in values.items()}


def _default(option: argparse.Action, value: Any, where: str) -> Any:
    several = option.nargs in ("+", "*")
    if value is None:
        return option.default
    if option.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false, not {brief(repr(value))}.")
        return value
    words = value if several and isinstance(value, list) else [value]
    if any(isinstance(word, bool) or not isinstance(word, str | int | float) for word in words):
        raise UsageError(f"{where} must be {'a list of words' if several else 'one word'}, not {brief(repr(value))}.")
    try:
        words = [str(word) for word in words]
        read = words if option.type is None else [option.type(word) for word in words]  # type: ignore[operator]
    except ValueError:
        raise UsageError(f"{where} is {brief(repr(value))}, which the option does not take (see --help).") from None
    return read if several else read[0]


def engine_config(found: argparse.Namespace) -> tuple[EngineConfig, Pair | None]:
    """The engine's config: the pair's values where one is named, and the command line over them."""
    alone = not (found.pair or found.target or found.draft)
    pair = load_pair(found.pair or EMBEDDED) if found.pair or alone else None
    values: dict[str, Any] = {}
    if pair:
        shared = ("target", "draft", "dtype", "load_in", "draft_load_in")
        values = {name: getattr(pair, name) for name in shared}
    values["max_sequences"] = at_least_one("--batch-size", found.batch_size)
    for field in fields(EngineConfig):
        given = getattr(found, field.name)
        if given is not None:
            values[field.name] = given
    return EngineConfig(**values), pair


def sampling(found: argparse.Namespace, stop: Sequence[str] = ()) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=found.max_new_tokens,
        temperature=found.temperature,
        top_k=found.top_k,
        top_p=found.top_p,
        min_p=found.min_p,
        seed=found.seed,
        method=found.sampling,
        stop=tuple(stop),
        ignore_eos=found.ignore_eos,
    )


def schedules(found: argparse.Namespace, besides: Collection[str] = ()) -> dict[str, Schedule]:
    """The schedule of each mode to run, by its name. Those named in `besides` have none."""
    settings = (found.gamma, found.branches, found.width, found.max_ahead)
    if not found.mode:
        raise UsageError(f"Name at least one mode: {', '.join(MODES)}.")
    return {name: Schedule.of(name, *settings) for name in found.mode if name not in besides}


def hardest(schedules: Iterable[Schedule]) -> Schedule:
    """The one that an engine must be made for to run them all; without any, the target alone."""

    def demands(schedule: Schedule) -> tuple[bool, bool, bool]:
        return schedule.drafts, schedule.post_verify or schedule.pre_verify, schedule.mode == "ar-all"

    return max(schedules, key=demands, default=Schedule.of("ar"))


def choose(count: int, limit: int | None, indices: str | None) -> list[int]:
    """The numbers of the problems to run out of `count`."""
    chosen = list(range(count))
    if indices is not None:
        chosen = []
        try:
            for part in str(indices).split(","):
                first, _, last = part.partition("-")
                named = range(int(first), int(last or first) + 1)
                chosen += named if named and named[0] >= 0 and named[-1] < count else [-1]
        except ValueError:
            raise UsageError(f"--indices must be written like 0,3,10-20, not {indices!r}.") from None
        if not chosen or not set(chosen) <= set(range(count)):
            raise UsageError(f"--indices {indices} are not all there: the problems are numbered 0 to {count - 1}.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    return list(dict.fromkeys(chosen))[:limit]


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name} must be at least 1, not {value}.")
    return value


def guarded(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A `main` whose `UsageError` becomes a line on standard error and exit code 2, and Ctrl-C one and 130. Both ranks
    meet it; one says it."""

    def say(line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)

    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UsageError as error:
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            say(
                "interrupted: what was finished is written. The same command goes on from there; an evaluation with "
                "--resume and the same --output."
            )
            return 130

    return run
