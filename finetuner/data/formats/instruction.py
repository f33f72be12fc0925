"""`type` as a block: a row's cells in the recipe's own format; the output is trained on."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetuner.data.formats.base import Rendered, Renderer, Span, answered, text_of
from finetuner.data.row_files import Row
from finetuner.recipe.sections import DataSection, DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of the entry's own format. A row without a system text of its own has the recipe's."""
    form = entry.type
    assert isinstance(form, InstructionFormat)

    def render(row: Row) -> Rendered:
        own = row.get(form.field_system) if form.field_system else None
        return render_instruction(row, form, form.system_prompt if own is None else text_of(row, form.field_system))

    return render


def render_instruction(row: Row, form: InstructionFormat, system: str) -> Rendered:
    """A row's cells in a format. Raises DataError if a cell is missing or is no text.

    A system text stands before the rest as system_format writes it, unless the format has a place for it.
    """
    cells = {"instruction": text_of(row, form.field_instruction), "system": system}
    answer = form.output_format.replace("{output}", text_of(row, form.field_output))
    given = row.get(form.field_input) if form.field_input else None
    cells["input"] = "" if given is None else text_of(row, form.field_input)
    pattern = form.format if cells["input"] else form.no_input_format
    if system and "{system}" not in pattern:
        pattern = form.system_format + pattern
    prompt, contents = _fill(pattern, cells)
    return answered(prompt, answer, tuple(contents))


_PLACEHOLDER = re.compile(r"\{(instruction|input|system)\}")


def _fill(pattern: str, cells: Mapping[str, str]) -> tuple[str, list[Span]]:
    """The pattern with its placeholders filled, and the spans of the fillings. All other braces are text."""
    out, contents = "", []
    for i, piece in enumerate(_PLACEHOLDER.split(pattern)):
        text = cells[piece] if i % 2 else piece
        if i % 2:
            contents.append((len(out), len(out) + len(text)))
        out += text
    return out, contents
