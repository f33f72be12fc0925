"""`finetuner convert`: another tool's recipe as one of ours."""

from pathlib import Path
from typing import Annotated

import typer

from finetuner.commands.first_row import look_at_first_row
from finetuner.recipe.convert import convert as converted
from finetuner.recipe.convert import write_new


def convert(
    foreign: Annotated[str, typer.Argument(help="A recipe of Axolotl, LLaMA-Factory or TRL.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; default: the screen.")] = None,
) -> None:
    """Print the converted recipe, or write it to a new file; notes go to stderr. Raises RecipeError."""
    result = converted(foreign, first_row=look_at_first_row)
    for note in result.notes:
        if not note.quiet and not note.message.startswith("is read as"):  # the file says those line by line
            typer.echo(f"note: {note}", err=True)
    if out is None:
        typer.echo(result.text.rstrip())
    else:
        write_new(out, result.text)
        typer.echo(f"{foreign}, a recipe of {result.tool}, is now {out}. Next: finetuner check {out}")
