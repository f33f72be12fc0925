"""`finetuner train`: train as the recipe says."""

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.recipe import load


def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train from the start or from a checkpoint. Raises FinetunerError."""
    loaded = load(recipe, overrides or [])
    from finetuner.run.train import train as run_training  # imports torch: only once the recipe is known to be right

    run_training(loaded.recipe, recipe, map(str, loaded.notes))
