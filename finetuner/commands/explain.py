"""`finetuner explain`: the meaning of one recipe key."""

from typing import Annotated

import typer

from finetuner.commands.arguments import Overrides
from finetuner.recipe import load
from finetuner.recipe.explain import explain as explained


def explain(
    key: Annotated[str, typer.Argument(help="A recipe key, such as lora_r or datasets.type.", show_default=False)],
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Print the key's meaning, type and default, and its value in RECIPE. Raises RecipeError."""
    typer.echo(explained(key, load(recipe, overrides or [], check_files=False) if recipe else None))
