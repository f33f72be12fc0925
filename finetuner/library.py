"""The functions of the package for Python programs: `finetuner.train` and `finetuner.merge`.

Torch and transformers are imported by the first call.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.recipe import Loaded, Recipe, load, load_recipe

if TYPE_CHECKING:
    from finetuner.export.merge import MergeResult
    from finetuner.run.result import TrainResult


def train(recipe: Recipe | str | Path) -> "TrainResult":
    """Train as a recipe says, or the file of one, and return what came of it.

    The same run as `finetuner train`, with its lines on the screen; on several ranks each of them calls this, as under
    `torchrun my_script.py`. Raises FinetunerError.
    """
    file = None if isinstance(recipe, Recipe) else str(recipe)
    loaded = Loaded(recipe) if isinstance(recipe, Recipe) else load(recipe)
    from finetuner.run.train import train as run  # imports torch: only once the recipe is known to be right

    return run(loaded.recipe, file, map(str, loaded.notes))


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
