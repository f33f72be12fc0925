"""The recipe that a user writes, strict and frozen. Nothing here imports torch."""

from finetuner.recipe.dump import dump_recipe, flat_values
from finetuner.recipe.foreign.translate import ALIASES
from finetuner.recipe.load import Loaded, load, load_recipe, load_values
from finetuner.recipe.schema import KEYS, NOT_YET, SECTIONS, Recipe

__all__ = [
    "ALIASES", "KEYS", "NOT_YET", "SECTIONS", "Loaded", "Recipe", "dump_recipe", "flat_values", "load", "load_recipe",
    "load_values",
]  # fmt: skip
