"""Settings of an evaluation: the recipe of a run, or of --recipe, or keys that are given for a model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuner.errors import RecipeError
from finetuner.evaluation.options import EvaluationOptions
from finetuner.models.attention import choose_attention
from finetuner.models.dtypes import DTYPES
from finetuner.plan.run import Plan
from finetuner.recipe import Loaded, Recipe, load, load_values
from finetuner.recipe.sections import DataSection, PackingSection
from finetuner.world import World


@dataclass(frozen=True)
class EvaluationSettings:
    """Rows, batches and number format of an evaluation, and how its models are loaded."""

    data: DataSection
    packing: PackingSection
    plan: Plan
    attention: tuple[str, ...]  # implementations to try, in this order
    trust_remote_code: bool

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the models."""
        return DTYPES[self.plan.precision]


def settings_of(recipe: Recipe, world: World) -> EvaluationSettings:
    """Take from a recipe what evaluation needs. Raises PlanError if this world cannot do what the recipe asks for."""
    plan, section = Plan.from_recipe(recipe, world), recipe.model
    attention = choose_attention(section.attn_implementation, world, plan.precision)
    return EvaluationSettings(recipe.data, recipe.packing, plan, attention, section.trust_remote_code)


def recipe_of_run(target: str, overrides: list[str], options: EvaluationOptions) -> Loaded | None:
    """Load the recipe that `target` is, or the one that a run left in it; None for a model, and where options name
    the rows. Raises RecipeError."""
    folder = Path(target).expanduser()
    if options.names_rows:
        return None
    if folder.suffix in (".yml", ".yaml") or folder.is_file():
        return load(target, overrides)
    places = (folder, folder.parent) if folder.is_dir() else ()
    found = next((place / "recipe.yml" for place in places if (place / "recipe.yml").exists()), None)
    return None if found is None else load(found, overrides)


def recipe_of_model(target: str, overrides: list[str], options: EvaluationOptions) -> Loaded:
    """Load the recipe that options name for a model, or read keys such as sequence_len=256 by a recipe's rules.

    Raises RecipeError, also if nothing says what to measure the model by."""
    if options.recipe is not None:
        return load(options.recipe, overrides)
    if not options.data and options.tasks is None:
        raise RecipeError(
            f"'{target}' is a model without the recipe of a run beside it, so nothing says what to measure it by. "
            "Add one of:\n"
            "  --data FILE --type alpaca   rows of a file\n"
            "  --recipe RECIPE             the held-out rows of a recipe\n"
            "  --tasks hellaswag,arc_easy  benchmark tasks of lm-eval"
        )
    sources = [{"path": path, "type": options.type} for path in options.data]
    # A recipe needs training rows and a learning rate, which evaluation does not read.
    unread = {"learning_rate": 1e-5, "datasets": sources or [{"path": "none", "type": "completion"}]}
    values: dict[str, Any] = {"base_model": target, "test_datasets": sources, **unread}
    return load_values(values, "evaluate", overrides)
