"""finetuner: fine-tune language models from one YAML recipe.

    import finetuner

    recipe = finetuner.load_recipe("my.yml", ["learning_rate=1e-4"])
    result = finetuner.train(recipe)      # TrainResult: folder, steps, metrics, best_eval_loss
    merged = finetuner.merge(recipe)      # MergeResult: folder, verification

Importing the package is cheap: torch and transformers are imported by the first call that needs them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from finetuner.export.merge import MergeResult
    from finetuner.run.result import TrainResult

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "FinetunerError",
    "MergeResult",
    "ModelError",
    "PlanError",
    "Recipe",
    "RecipeError",
    "TrainResult",
    "TrainingError",
    "load_recipe",
    "merge",
    "train",
]


def train(recipe: Recipe | str | Path) -> "TrainResult":
    """Train as a recipe says, or the file of one, and return what came of it.

    The same run as `finetuner train`, with its lines on the screen; on several ranks each of them calls this, as under
    `torchrun my_script.py`. Raises FinetunerError.
    """
    from finetuner.run.train import train as run

    if isinstance(recipe, Recipe):
        return run(recipe)
    return run(load_recipe(recipe), name=str(recipe))


def merge(source: Recipe | str | Path, **options: Any) -> "MergeResult":
    """Merge the adapter that a recipe trained, or the one in a folder, into its base, verify it, and return figures.

    `source`: a recipe, its file, or the folder of an adapter. `options`: fields of MergeOptions, such as
    `output=Path("merged")`, `dtype="float32"`, `verify=False`. Prints nothing. Raises FinetunerError.
    """
    from finetuner.export.merge import merge as run
    from finetuner.export.merge_options import MergeOptions

    if isinstance(source, Recipe) or Path(source).is_dir():
        return run(source, MergeOptions(**options))
    return run(load_recipe(source), MergeOptions(**options), recipe_name=str(source))


def __getattr__(name: str) -> Any:
    """Import the results' classes when they are asked for: they bring torch."""
    if name == "TrainResult":
        from finetuner.run.result import TrainResult

        return TrainResult
    if name == "MergeResult":
        from finetuner.export.merge import MergeResult

        return MergeResult
    raise AttributeError(f"module 'finetuner' has no attribute '{name}'")
