"""`type: instruction_chat`: an instruction and its answer, as a conversation of the chat template.

The question is the instruction and, on the line below it, the input; one of the two may be empty. A system text and
earlier turns stand before it. Every answer is trained on, those of the history too.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetuner.data.chat_renderer import build_chat_renderer
from finetuner.data.formats.base import Rendered, Renderer, kind_of, text_of
from finetuner.data.messages import Conversation, MessageReader, Messages, only_last_turn
from finetuner.data.row_files import Row
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, InstructionColumns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USUAL = InstructionColumns()
# Columns in which tools of the field look for a part of what is learned, and which this type does not read.
_READ_ELSEWHERE = (
    "messages", "conversations", "images", "image", "videos", "video", "audios", "audio", "chosen", "rejected",
)  # fmt: skip


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of instructions as chats. Raises DataError if the tokenizer has no template to be used."""
    reader, columns = MessageReader.of(entry), entry.instruction_columns
    chat = build_chat_renderer(
        tokenizer,
        kwargs=section.chat_template_kwargs,
        eot_tokens=section.eot_tokens,
        train_on_eos=entry.train_on_eos,
        train_on_eot=entry.train_on_eot,
    )

    def render(row: Row) -> Rendered:
        ignored = _require_read(row, columns)
        conversation = _conversation(row, columns, entry, reader)
        if entry.train_on_last_turn:
            conversation = only_last_turn(conversation)
        roles = tuple(str(message["role"]) for message in conversation.messages)
        return replace(chat.render(conversation), roles=roles, ignored=ignored)

    return render


def _conversation(row: Row, columns: InstructionColumns, entry: DatasetEntry, reader: MessageReader) -> Conversation:
    system, asked = _text(row, columns.system), text_of(row, columns.instruction)
    question = "\n".join(text for text in (asked, _text(row, columns.input)) if text)
    messages: Messages = [{"role": "system", "content": system}] if system else []
    for earlier, answer in _history(row, columns.history):
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text_of(row, columns.output)}]
    tools = row.get(columns.tools) if columns.tools is not None else None
    return reader.read({entry.field_messages: messages, entry.field_tools: tools})


def _text(row: Row, column: str | None) -> str:
    """Return the text in a column that may be missing or null."""
    return text_of(row, column) if column is not None and row.get(column) is not None else ""


def _history(row: Row, column: str | None) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of earlier turns. Raises DataError if they are something else."""
    cell: Any = row.get(column) if column is not None else None
    if cell is None or cell == "":
        return []
    if not isinstance(cell, list):
        raise DataError(f"column '{column}' holds {kind_of(cell)}, but must be a list of [question, answer]")
    pairs = []
    for i, turn in enumerate(cell):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError(f"turn {i} of column '{column}' is {turn!r:.80}, but must be [question, answer], two texts")
        pairs.append((turn[0], turn[1]))
    return pairs


def _require_read(row: Row, columns: InstructionColumns) -> tuple[str, ...]:
    """Return the columns with something in them that the entry says not to read.

    Raises DataError for one that would be left out of what is learned without a word.
    """
    named = columns.model_dump()
    read, left = {name for name in named.values() if name is not None}, []
    for part, usual in _USUAL.model_dump().items():
        if usual in row and usual not in read and row[usual] not in (None, "", []):
            if named[part] is not None:
                raise DataError(
                    f"column '{usual}' is not read: '{named[part]}' is named in its place. Write "
                    f"`instruction_columns: {{{part}: {usual}}}`, or take the column out of the rows"
                )
            left.append(usual)
    for name in _READ_ELSEWHERE:
        if name in row and name not in read and row[name] not in (None, "", [], {}):
            raise DataError(
                f"column '{name}' is not read by `type: instruction_chat`, so it would be left out. "
                "Take it out of the rows, or write the type that reads it"
            )
    return tuple(left)
