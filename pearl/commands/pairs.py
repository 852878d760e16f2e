"""`pearl pairs`: every pair of the registry, smallest first, or whether one fits on this machine.

Exit code of one pair: 0: it fits, 1: it does not, 2: there is no such pair.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from pearl.config import cli, pairs
from pearl.config.pairs import Fit


def parser() -> cli.Parser:
    made = cli.Parser("pairs", "", "qwen2.5-coder-0.5b-7b", "my-pair.yaml")
    made.add_argument("pair", nargs="?", help="a name of the list, or a path to a YAML file (default: list them all)")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    name = parser().parse_args(argv).pair
    chosen = pairs.all_pairs() if name is None else [pairs.load_pair(name)]
    machine = pairs.probe()
    fits = [pairs.check(pair, machine) for pair in chosen]
    if name is None:
        show(fits)
        return 0
    (fit,) = fits
    pair = fit.pair
    licence = pair.licence and f"Licence: {pair.licence.removesuffix('.')}."
    print("\n".join(filter(None, (fit.verdict, licence, pair.note))))
    return 0 if fit.fits else 1


def show(fits: Iterable[Fit]) -> None:
    """Names whole at any width, since they are what one types; the models are folded where there is no room."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("target", overflow="fold")
    table.add_column("draft", overflow="fold")
    table.add_column("GB", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for fit in fits:
        pair, need = fit.pair, sum(place.need_gb for place in fit.places)
        target, draft = (
            model if load_in is None else f"{model} {load_in}"
            for model, load_in in ((pair.target, pair.load_in), (pair.draft, pair.draft_load_in))
        )
        table.add_row(pair.name, target, draft, f"{need:.1f}", "yes" if fit.fits else "no")
    # A pipe has no width of its own: give it one that breaks nothing, so that grep finds it.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
