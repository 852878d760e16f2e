"""`pearl eval`: a benchmark, decoded in several modes at once, measured and scored. `eval/*.py` are the same code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from pearl.config import cli
from pearl.errors import UsageError
from pearl.evaluation import eval_config
from pearl.evaluation import main as evaluation
from pearl.options import did_you_mean
from pearl.tasks.benchmark import Benchmark

BENCHMARKS = {
    "humaneval": "pearl.tasks.humaneval",
    "gsm8k": "pearl.tasks.gsm8k",
    "mgsm": "pearl.tasks.mgsm",
    "mt-bench": "pearl.tasks.mt_bench",
    "spec-bench": "pearl.tasks.spec_bench",
    "speed-bench": "pearl.tasks.speed_bench.benchmark",
    "input-length": "pearl.tasks.sweeps.input_length",
}


def benchmark(name: str) -> Benchmark:
    return importlib.import_module(BENCHMARKS[name]).BENCHMARK


def parser() -> cli.Parser:
    """Of the command without a benchmark: it names them."""
    made = cli.Parser("eval", *(f"{name} {eval_config.EXAMPLES[0]}" for name in BENCHMARKS))
    made.usage = "pearl eval BENCHMARK [options]"
    made.add_argument("benchmark", metavar="BENCHMARK", choices=tuple(BENCHMARKS), help=", ".join(BENCHMARKS))
    return made


def script(name: str) -> Callable[..., int]:
    """The `main` of a file in `eval/`: the command with this benchmark."""
    return lambda argv=None: main([name, *(sys.argv[1:] if argv is None else argv)])


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        if not words or {"-h", "--help"} & set(words):
            parser().parse_args(words)
        raise UsageError("The benchmark comes first, and options behind it: pearl eval gsm8k --limit 20.")
    name, *rest = words
    if name not in BENCHMARKS:
        end = did_you_mean(name, BENCHMARKS)
        raise UsageError(f"There is no benchmark {name!r}{end} Choose from {', '.join(BENCHMARKS)}.")
    return evaluation.main(benchmark(name), rest)
