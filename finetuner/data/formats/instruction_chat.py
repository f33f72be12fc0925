"""`type: instruction_chat`: an instruction and its answer, as a conversation of the chat template.

The question is the instruction and, on the line below it, the input; one of the two may be empty. A system text and
earlier turns stand before it. Every answer is trained on, those of the history too.
"""

from typing import TYPE_CHECKING

from finetuner.data.formats.alpaca import earlier_turns
from finetuner.data.formats.base import Renderer, text_of
from finetuner.data.formats.chat_template import ChatRows
from finetuner.data.messages import Conversation, MessageReader, Messages
from finetuner.data.row_files import Row
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of instructions as chats. Raises DataError if the tokenizer has no template to be used."""
    rows = ChatRows(entry, section, tokenizer)
    return lambda row: rows.render(row, _conversation(row, entry, rows.reader))


def _conversation(row: Row, entry: DatasetEntry, reader: MessageReader) -> Conversation:
    columns, left_out = entry.instruction_columns, entry.unused_names
    if left_out:
        row = {name: cell for name, cell in row.items() if name not in left_out}
    system, asked = _text(row, columns.system), text_of(row, columns.instruction)
    question = "\n".join(text for text in (asked, _text(row, columns.input)) if text)
    messages: Messages = [{"role": "system", "content": system}] if system else []
    for earlier, answer in earlier_turns(row.get(columns.history) if columns.history else None):
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text_of(row, columns.output)}]
    tools = row.get(columns.tools) if columns.tools else None
    return reader.read({entry.field_messages: messages, entry.field_tools: tools})


def _text(row: Row, column: str) -> str:
    """Return the text in a column that may be missing or null."""
    return text_of(row, column) if column and row.get(column) is not None else ""
