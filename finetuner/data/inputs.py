"""The tokenizer of a recipe, and the documents that it makes of the rows."""

from typing import TYPE_CHECKING

from finetuner.console import Screen
from finetuner.data.cache import prepare_once
from finetuner.data.chat_templates import chosen_template
from finetuner.data.prepare import Prepared, held_out_only
from finetuner.data.tokenizer import Vocabulary, load_tokenizer
from finetuner.data.tokenizer_source import tokenizer_name
from finetuner.recipe import Recipe
from finetuner.world import World

if TYPE_CHECKING:
    pass


def prepare_rows(recipe: Recipe, world: World, seed: int, screen: Screen) -> tuple[Vocabulary, Prepared]:
    """The tokenizer with the recipe's chat template, and the documents that it makes of the rows."""
    with screen.work("making the tokenizer", "rows") as work:
        name = tokenizer_name(recipe, world, work.at)
    source, ends = name or recipe.model.base_model, recipe.data.eot_tokens or ()
    vocabulary = load_tokenizer(recipe.tokenizer, source, recipe.model.trust_remote_code, ends=ends)
    tokenizer = vocabulary.tokenizer
    tokenizer.chat_template = chosen_template(recipe.data, tokenizer.chat_template)  # saved with the result
    with screen.work("tokenising", "rows") as work:
        section = held_out_only(recipe.data) if recipe.data.streaming else recipe.data
        return vocabulary, prepare_once(section, recipe.packing, tokenizer, seed, world, work.at)
