"""`pearl eval`: a data set, decoded in several modes at once, measured and scored. `eval/*.py` are the same code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pearl.config import cli
from pearl.errors import UsageError
from pearl.evaluation import eval_config
from pearl.evaluation import main as evaluation
from pearl.options import nearest
from pearl.tasks.suite import Suite

SUITES = {
    "humaneval": "pearl.tasks.humaneval",
    "gsm8k": "pearl.tasks.gsm8k",
    "mgsm": "pearl.tasks.mgsm",
    "mt-bench": "pearl.tasks.mt_bench",
    "spec-bench": "pearl.tasks.spec_bench",
}


def suite(name: str) -> Suite:
    return importlib.import_module(SUITES[name]).SUITE


def parser() -> cli.Parser:
    """Of the command without a data set: it names them."""
    made = cli.Parser("eval", *(f"{name} {eval_config.EXAMPLES[0]}" for name in SUITES))
    made.usage = "pearl eval DATASET [options]"
    made.add_argument("suite", metavar="DATASET", choices=tuple(SUITES), help=", ".join(SUITES))
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        parser().parse_args(words)
    name, *rest = words
    if name not in SUITES:
        near = nearest(name, SUITES)
        hint = f"; did you mean {near}?" if near else "."
        raise UsageError(f"There is no data set {name!r}{hint} Choose from {', '.join(SUITES)}.")
    return evaluation.main(suite(name), rest)
