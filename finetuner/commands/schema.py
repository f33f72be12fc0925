"""`finetuner schema`: the JSON Schema of a recipe, or its reference as a page."""

import json
from typing import Annotated

import typer

from finetuner.recipe.explain import json_schema, reference


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference as a page instead.")] = False,
) -> None:
    """Print the JSON Schema, or the reference in Markdown."""
    typer.echo(reference().rstrip() if markdown else json.dumps(json_schema(), indent=1))
