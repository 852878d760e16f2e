"""`pearl distill`: a small draft model from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.commands.training.train import recipe_parser
from pearl.config import cli, outputs
from pearl.training.recipes import DistillRecipe, read_recipe


def parser() -> cli.Parser:
    made = recipe_parser("distill", "configs/distill/smollm2-135m.yaml", DistillRecipe)
    made.add_argument("--whole", metavar="DIR", type=outputs.folder, help="write the model with its embeddings too")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    recipe = read_recipe(DistillRecipe, found.config, cli.given(found, but=("config", "whole")))

    from pearl.training import distill

    distill.run(recipe, found.whole)
    return 0
