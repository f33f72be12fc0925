"""finetuner: fine-tune language models from one YAML recipe."""

from finetuner.errors import (
    CheckpointError,
    DataError,
    FinetunerError,
    ModelError,
    PlanError,
    RecipeError,
    TrainingError,
)
from finetuner.recipe import Recipe, load_recipe

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "FinetunerError",
    "ModelError",
    "PlanError",
    "Recipe",
    "RecipeError",
    "TrainingError",
    "load_recipe",
]
