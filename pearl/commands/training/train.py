"""`pearl train`: a feature drafter from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.config import cli
from pearl.errors import UsageError

RECIPE = "configs/feature/smollm2-135m.yaml"


def recipe_parser(command: str, recipe: str) -> cli.Parser:
    """What both trainings take: a recipe, and what replaces a value of it."""
    made = cli.Parser(command, f"--config {recipe}", f"--config {recipe} --epochs 1 --output results/short")
    made.add_argument("--config", metavar="FILE", help="the recipe")
    made.add_argument("--data", metavar="DIR", help="recorded texts; default: the recipe's")
    made.add_argument("--output", metavar="DIR", help="default: the recipe's")
    made.add_argument("--target", help="default: the recipe's")
    made.add_argument("--epochs", type=float, help="default: the recipe's")
    return made


def parser() -> cli.Parser:
    made = recipe_parser("train", RECIPE)
    made.add_argument("--segments", type=int, help="pieces in which slots are read, which saves memory")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    if not found.config:
        raise UsageError(f"Give --config: a recipe such as {RECIPE}.")

    from pearl.training import train
    from pearl.training.recipes import FeatureRecipe, read_recipe

    train.run(read_recipe(FeatureRecipe, found.config, cli.given(found, but=("config",))))
    return 0
