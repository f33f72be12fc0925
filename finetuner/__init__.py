"""finetuner: fine-tune language models from one YAML recipe.

    import finetuner

    recipe = finetuner.load_recipe("my.yml", ["learning_rate=1e-4"])
    result = finetuner.train(recipe)      # TrainResult: folder, steps, metrics, best_eval_loss
    merged = finetuner.merge(recipe)      # MergeResult: folder, verification

Importing the package is cheap: torch and transformers are imported by the first call that needs them.
"""

from typing import TYPE_CHECKING, Any

from finetuner.errors import (
    CheckpointError,
    DataError,
    FinetunerError,
    LostConnectionError,
    ModelError,
    PlanError,
    PreemptedError,
    RecipeError,
    TrainingError,
)
from finetuner.library import merge, train
from finetuner.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from finetuner.export.merge import MergeResult
    from finetuner.run.result import TrainResult

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "FinetunerError",
    "LostConnectionError",
    "MergeResult",
    "ModelError",
    "PlanError",
    "PreemptedError",
    "Recipe",
    "RecipeError",
    "TrainResult",
    "TrainingError",
    "load_recipe",
    "merge",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the results' classes when they are asked for: they bring torch."""
    if name == "TrainResult":
        from finetuner.run.result import TrainResult

        return TrainResult
    if name == "MergeResult":
        from finetuner.export.merge import MergeResult

        return MergeResult
    raise AttributeError(f"module 'finetuner' has no attribute '{name}'")
