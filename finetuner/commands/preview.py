"""`finetuner preview`: rows as the model sees them, on the terminal and as a page. No model is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.console import Screen
from finetuner.recipe import load


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="Documents to show of each source.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows to read of each source.")] = 2000,
    source: Annotated[
        int | None, typer.Option("--source", "-k", help="Only this one of `datasets`, counted from 0.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Each token with its id.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page too: lengths, packs, dropped rows.")] = None,
) -> None:
    """Show `count` documents of the first `rows` rows of each source. Raises FinetunerError."""
    loaded, screen = load(recipe, overrides or []), Screen(enabled=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    from finetuner.commands.preview_text import show_preview  # imports torch: the recipe is known to be right

    show_preview(loaded.recipe, recipe, screen, count=count, rows=rows, source=source, ids=ids, html=html)
