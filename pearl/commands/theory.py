"""`pearl theory`: the table of `docs/explanations/theory.md`."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.config import cli
from pearl.core import theory


def parser() -> cli.Parser:
    return cli.Parser("theory", "")


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser().parse_args(argv)
    print(theory.table())
    return 0
