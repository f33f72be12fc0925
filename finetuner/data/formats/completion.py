"""`type: completion`: plain text, all of it trained on, with its end."""

from typing import TYPE_CHECKING

from finetuner.data.formats.base import Rendered, Renderer, text_of
from finetuner.data.row_files import Row
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of the text in the column `field`."""

    def render(row: Row) -> Rendered:
        text = text_of(row, entry.field)
        return Rendered(text, ((0, len(text)),), wraps=True)

    return render
