"""`type: prompt_completion`: columns prompt and completion, joined as they are; the completion is trained on."""

from typing import TYPE_CHECKING

from finetuner.data.formats.base import Renderer, answered, text_of
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of a prompt and its completion, whose end is trained on too."""
    return lambda row: answered(text_of(row, "prompt"), text_of(row, "completion"))
