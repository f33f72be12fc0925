"""Arguments and options that several commands share."""

from typing import Annotated

import typer

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Recipe keys to set, such as learning_rate=1e-4.", show_default=False
    ),
]
ModelOrRecipe = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RECIPE", help="A model's folder or hub id, or a recipe.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest that have this share.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")]
