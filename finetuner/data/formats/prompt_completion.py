"""`type: prompt_completion`: columns prompt and completion; the completion is trained on.

Two texts are joined as they are. Two lists of messages, as TRL has them, are one conversation in the form that the chat
template gives it; the answers of the second list are trained on.
"""

from typing import TYPE_CHECKING, Any

from finetuner.data.formats.base import Rendered, Renderer, answered, cell_of, kind_of, text_of
from finetuner.data.formats.chat_template import ChatRows
from finetuner.data.formats.instruction import require_no_placeholder
from finetuner.data.row_files import Row
from finetuner.data.unused_columns import ColumnCheck
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of a prompt and its completion, whose end is trained on too."""
    of_texts = ColumnCheck.of(entry, used=frozenset(entry.required_columns))
    chat_keys = entry.chat_keys_set
    chats: list[ChatRows] = []  # made for the first row of messages: rows of texts need no chat template

    def render(row: Row) -> Rendered:
        prompt, completion = cell_of(row, "prompt"), cell_of(row, "completion")
        if isinstance(prompt, list) or isinstance(completion, list):
            _require_messages(prompt, completion)
            if not chats:
                chats.append(ChatRows(entry, section, tokenizer))
            return chats[0].render(row, chats[0].reader.read_messages(row, [*prompt, *completion], len(prompt)))
        if chat_keys:
            raise DataError(f"prompt and completion are texts: `{chat_keys[0]}` is for messages. Remove it")
        require_no_placeholder(row, ("prompt",), entry)
        for name, cell in (("prompt", prompt), ("completion", completion)):
            if isinstance(cell, dict):
                raise DataError(
                    f"column '{name}' holds {kind_of(cell)}, but must be text, or a list of messages: [{{...}}]"
                )
        rendered = answered(text_of(row, "prompt"), text_of(row, "completion"))
        if not of_texts.knows_all(row):
            of_texts.find_ignored(row, rendered)
        return rendered

    return render


def _require_messages(prompt: Any, completion: Any) -> None:
    """Raise DataError unless both are lists of messages."""
    for name, cell in (("prompt", prompt), ("completion", completion)):
        if not isinstance(cell, list) or not cell:
            other = "completion" if name == "prompt" else "prompt"
            raise DataError(
                f"column '{name}' holds {kind_of(cell)}, and '{other}' a list of messages. Make both lists of "
                "messages, or both texts"
            )
