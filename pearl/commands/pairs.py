"""`pearl pairs`: every pair of the registry, smallest first; whether one fits on this machine; what a checkpoint is.

Exit code of one pair: 0: it fits, 1: it does not, 2: there is no such pair. Of a draft checkpoint: 0, or 2 where pearl
does not read it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

from pearl.config import cli, pairs
from pearl.config.engine_config import FEATURE, model_path
from pearl.config.pairs import Fit


def parser() -> cli.Parser:
    made = cli.Parser("pairs", "", "qwen2.5-coder-0.5b-7b", "my-pair.yaml", "RedHatAI/Qwen3-8B-speculator.eagle3")
    made.add_argument(
        "pair",
        nargs="?",
        help="a name of the list, a path to a YAML file, or a draft checkpoint to describe: a folder or a hub id "
        "(default: list them all)",
    )
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    name = parser().parse_args(argv).pair
    if name is not None and _is_checkpoint(name):
        return describe(name)
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


def _is_checkpoint(name: str) -> bool:
    """A folder, a GGUF file, a drafter that comes with pearl or what looks like a hub id."""
    name = name.removeprefix(FEATURE)
    if name in {pair.name for pair in pairs.all_pairs()}:
        return False
    path = model_path(name)
    if path.exists():
        return path.is_dir() or path.suffix == ".gguf"
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith((".yaml", ".yml"))


def describe(name: str) -> int:
    """What a draft checkpoint is, by its config and the shapes of its tensors."""
    from pearl.checkpoints.drafts import kinds

    found = kinds.describe(name)
    numbers = sum(math.prod(shape) for shape in found.files.shapes.values())
    size = f"{numbers / 1e6:,.1f} million weights" if numbers >= 1e5 else f"{numbers:,} weights" if numbers else ""
    verifier = found.target and f"Target: {found.target}."
    said = "\n".join(filter(None, (f"{found.line}.", verifier, size and f"Size: {size}.")))
    print(said.encode(errors="backslashreplace").decode())  # a config.json may hold half a character
    return 0


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
