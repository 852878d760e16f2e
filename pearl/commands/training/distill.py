"""`pearl distill`: a small draft model from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.commands.training.train import recipe_parser
from pearl.config import cli
from pearl.errors import UsageError

RECIPE = "configs/distill/smollm2-135m.yaml"


def parser() -> cli.Parser:
    made = recipe_parser("distill", RECIPE)
    made.add_argument("--whole", metavar="DIR", help="write the trained model with its embeddings to this folder")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    if not found.config:
        raise UsageError(f"Give --config: a recipe such as {RECIPE}.")

    from pearl.training import distill
    from pearl.training.recipes import DistillRecipe, read_recipe

    overrides = cli.given(found, but=("config", "whole"))
    distill.run(read_recipe(DistillRecipe, found.config, overrides), found.whole)
    return 0
