"""`type` as a block: a row's cells in the recipe's own format; the output is trained on."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetuner.data.formats.base import Rendered, Renderer, Span, kind_of, text_of
from finetuner.data.media import find_placeholder, placeholder_message
from finetuner.data.row_files import Row
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of the entry's own format. A row without a system text of its own has the recipe's."""
    form = entry.type
    assert isinstance(form, InstructionFormat)
    left_out = frozenset(entry.unused_names)
    system_column = None if form.system_column in left_out else form.system_column

    def render(row: Row) -> Rendered:
        require_no_placeholder(row, (form.field_instruction, form.input_column), entry)
        own = None if system_column is None else row.get(system_column)
        system = form.system_prompt if own is None or system_column is None else text_of(row, system_column)
        return render_instruction(row, form, system, left_out)

    return render


def render_instruction(row: Row, form: InstructionFormat, system: str, left_out: frozenset[str]) -> Rendered:
    """A row's cells in a format. Raises DataError if a cell is missing, is no text, or has no place in the format.

    A system text stands before the rest as system_format writes it, unless the format has a place for it. left_out:
    columns that the recipe leaves out.
    """
    cells = {"instruction": text_of(row, form.field_instruction), "system": system}
    answer = text_of(row, form.field_output)
    cells["input"] = _input_text(row, form, left_out)
    pattern = form.format if cells["input"] else form.no_input_format
    if system and "{system}" not in pattern:
        pattern = form.system_format + pattern
    prompt, contents = fill(pattern, cells)
    before, _, after = form.output_format.partition("{output}")
    start = len(prompt) + len(before)
    contents.append((start, start + len(answer)))
    text = prompt + before + answer + after
    return Rendered(text, ((len(prompt), len(text)),), wraps=True, contents=tuple(contents))


def _input_text(row: Row, form: InstructionFormat, left_out: frozenset[str]) -> str:
    column = form.input_column
    if column is None or column in left_out or row.get(column) is None:
        return ""
    text = text_of(row, column)
    if text.strip() and "{input}" not in form.format:
        raise DataError(
            f"column '{column}' holds {kind_of(text)}, and the format has no {{input}}, so it would be left out. Write "
            f"{{input}} where it goes, or `unused_columns: [{column}]` beside `path`"
        )
    return text


def require_no_placeholder(row: Row, columns: tuple[str | None, ...], entry: DatasetEntry) -> None:
    """Raise DataError if a cell of a prompt begins or ends with the placeholder of a picture, video or sound."""
    for column in columns:
        text = row.get(column) if column is not None else None
        found = find_placeholder(text) if isinstance(text, str) else None
        if found is not None and entry.unused_columns != "ignore" and found not in entry.unused_names:
            raise DataError(placeholder_message(f"column '{column}'", found))


_PLACEHOLDER = re.compile(r"\{(instruction|input|system)\}")


def fill(pattern: str, cells: Mapping[str, str]) -> tuple[str, list[Span]]:
    """The pattern with its placeholders filled, and the spans of the fillings. All other braces are text."""
    out, contents = "", []
    for i, piece in enumerate(_PLACEHOLDER.split(pattern)):
        text = cells[piece] if i % 2 else piece
        if i % 2:
            contents.append((len(out), len(out) + len(text)))
        out += text
    return out, contents
