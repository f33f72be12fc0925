"""`finetuner check`: name every mistake in a recipe."""

from typing import Annotated

import typer

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.commands.first_row import look_at_first_row
from finetuner.recipe.convert import check_lines


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also what is accepted without effect.")] = False,
) -> None:
    """Print what is found in the recipe. Raises RecipeError with every mistake."""
    for line in check_lines(recipe, overrides or [], verbose=verbose, first_row=look_at_first_row):
        typer.echo(line)
