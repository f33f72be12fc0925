"""Objectives, which say what a run minimizes: one file for each, and one row in the table."""

from collections.abc import Callable
from typing import NamedTuple

from finetuner.objectives.base import Objective
from finetuner.objectives.next_token import NextToken
from finetuner.recipe import Recipe


class ObjectiveRow(NamedTuple):
    """An objective: whether a recipe asks for it, and what builds it from the recipe's sections."""

    is_asked_for: Callable[[Recipe], bool]
    build: Callable[[Recipe], Objective]


# The last row that a recipe asks for is its objective; next token is what every recipe asks for. A new one adds its
# file, its row here, its recipe section, and the row type that its rows come in.
OBJECTIVES: dict[str, ObjectiveRow] = {
    "next_token": ObjectiveRow(lambda recipe: True, lambda recipe: NextToken.from_section(recipe.regularization)),
}


def build_objective(recipe: Recipe) -> Objective:
    """Return the objective of a recipe."""
    return [row for row in OBJECTIVES.values() if row.is_asked_for(recipe)][-1].build(recipe)
