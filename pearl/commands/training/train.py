"""`pearl train`: a feature drafter from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from pearl import options
from pearl.config import cli
from pearl.training.recipes import FeatureRecipe, Recipe, read_recipe


def recipe_parser(command: str, recipe: str, kind: type[Recipe]) -> cli.Parser:
    """What both trainings take: a recipe, and what replaces a value of it."""
    made = cli.Parser(command, f"--config {recipe}", f"--config {recipe} --epochs 1 --output results/short")
    made.add_argument("--config", metavar="FILE", required=True, help=f"the recipe, such as {recipe}")
    made.take(options.of(kind), replace=True).set_defaults(**dict.fromkeys(made.options))
    return made


def parser() -> cli.Parser:
    return recipe_parser("train", "configs/feature/smollm2-135m.yaml", FeatureRecipe)


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    recipe = read_recipe(FeatureRecipe, found.config, cli.given(found, but=("config",)))

    from pearl.training import train

    train.run(recipe)
    return 0
