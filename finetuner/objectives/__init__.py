"""Objectives, which say what a run minimizes: one file for each, and one row in the table."""

from collections.abc import Callable

from finetuner.objectives.base import Objective
from finetuner.objectives.next_token import NextToken
from finetuner.recipe import Recipe

# Name -> the objective that a recipe describes. A new one adds its file, its row here, its recipe section, and the row
# type that its rows come in.
OBJECTIVES: dict[str, Callable[[Recipe], Objective]] = {
    "next_token": lambda recipe: NextToken.from_section(recipe.regularization),
}


def build_objective(recipe: Recipe, name: str = "next_token") -> Objective:
    """Return the objective of a recipe."""
    return OBJECTIVES[name](recipe)
