"""`finetuner check`: name every mistake in a recipe."""

from typing import Annotated

import typer

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.recipe.convert import check_lines


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also what is accepted without effect.")] = False,
) -> None:
    """Print what is found in the recipe. Raises RecipeError with every mistake."""
    from finetuner.data.first_row import first_row_at_hand

    for line in check_lines(recipe, overrides or [], verbose=verbose, first_row=first_row_at_hand):
        typer.echo(line)
