"""`type: chat_template`: a list of messages, in the form that the chat template gives them (data/messages.py)."""

from typing import TYPE_CHECKING

from finetuner.data.chat_renderer import build_chat_renderer
from finetuner.data.formats.base import Renderer
from finetuner.data.messages import MessageReader, only_last_turn
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of conversations. Raises DataError if the tokenizer has no chat template that can be used."""
    reader = MessageReader.of(entry)
    chat = build_chat_renderer(
        tokenizer,
        kwargs=section.chat_template_kwargs,
        eot_tokens=section.eot_tokens,
        train_on_eos=entry.train_on_eos,
        train_on_eot=entry.train_on_eot,
    )
    if entry.train_on_last_turn:
        return lambda row: chat.render(only_last_turn(reader.read(row)))
    return lambda row: chat.render(reader.read(row))
