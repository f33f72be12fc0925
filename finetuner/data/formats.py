"""Row -> text, and which of its characters are trained on, for rows that are not conversations. Nothing is tokenised
here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetuner.data.row_files import Row
from finetuner.errors import DataError
from finetuner.recipe.sections import InstructionFormat

Span = tuple[int, int]  # [start, stop) in characters


@dataclass(frozen=True)
class Rendered:
    """`spans` are trained on. `wraps` asks for the tokenizer's own begin and end of text; a chat template writes them
    itself, so that a second BOS would be one too many. In `contents`, text that came from the row's cells, words that
    look like special tokens are words."""

    text: str
    spans: tuple[Span, ...]
    wraps: bool
    contents: tuple[Span, ...] = ()


_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
# The Stanford Alpaca prompt (github.com/tatsu-lab/stanford_alpaca), with and without an input column.
ALPACA = InstructionFormat(
    format=_INTRO.format(", paired with an input that provides further context")
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    no_input_format=_INTRO.format("") + "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
)


def render_alpaca(row: Row) -> Rendered:
    """Columns instruction, input (may be missing, null or empty) and output, which is trained on."""
    return _instruction(row, ALPACA, system="")


def render_instruction(row: Row, form: InstructionFormat) -> Rendered:
    """The row's cells in the recipe's own format; the output is trained on.

    A system text stands before the rest as system_format writes it, unless the format has a place for it.
    """
    own = row.get(form.field_system)
    return _instruction(row, form, form.system_prompt if own is None else _text(row, form.field_system))


def _instruction(row: Row, form: InstructionFormat, system: str) -> Rendered:
    cells = {"instruction": _text(row, form.field_instruction), "system": system}
    answer = _text(row, form.field_output)
    given = row.get(form.field_input)
    cells["input"] = "" if given is None else _text(row, form.field_input)
    pattern = form.format if cells["input"] else form.no_input_format
    if system and "{system}" not in pattern:
        pattern = form.system_format + pattern
    prompt, contents = _fill(pattern, cells)
    stop = len(prompt) + len(answer)
    return Rendered(prompt + answer, ((len(prompt), stop),), wraps=True, contents=(*contents, (len(prompt), stop)))


_PLACEHOLDER = re.compile(r"\{(instruction|input|system)\}")


def _fill(pattern: str, cells: Mapping[str, str]) -> tuple[str, list[Span]]:
    """The pattern with its placeholders filled, and where the fillings are. All other braces are text."""
    out, contents = "", []
    for i, part in enumerate(_PLACEHOLDER.split(pattern)):
        text = cells[part] if i % 2 else part
        if i % 2:
            contents.append((len(out), len(out) + len(text)))
        out += text
    return out, contents


def render_completion(row: Row, column: str) -> Rendered:
    """Plain text, all of it trained on, with its end."""
    text = _text(row, column)
    return Rendered(text, ((0, len(text)),), wraps=True)


def render_prompt_completion(row: Row) -> Rendered:
    """Columns prompt and completion, joined as they are; the completion is trained on, with its end."""
    prompt, answer = _text(row, "prompt"), _text(row, "completion")
    stop = len(prompt) + len(answer)
    return Rendered(prompt + answer, ((len(prompt), stop),), wraps=True, contents=((0, stop),))


def render_segments(row: Row) -> Rendered:
    """Column `segments`: a list of {text, label}, joined as they are; those with a true label are trained on. Begin and
    end of text are up to the row."""
    segments = cell_of(row, "segments")
    if not isinstance(segments, list) or not segments:
        raise DataError(f"column 'segments' holds {kind_of(segments)}, but must be a list of {{text, label}}")
    text, spans = "", []
    for i, segment in enumerate(segments):
        part = segment.get("text") if isinstance(segment, dict) else None
        if not isinstance(part, str) or not isinstance(segment.get("label"), bool):
            raise DataError(
                f"segment {i} must have text in 'text', and true or false in 'label'; it is {segment!r:.150}"
            )
        if segment["label"]:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return Rendered(text, tuple(spans), wraps=False)


def _text(row: Row, column: str) -> str:
    value = cell_of(row, column)
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {kind_of(value)}, but must be text")
    return value


def cell_of(row: Row, column: str) -> Any:
    """Raises DataError if the row has no such column."""
    if column not in row:
        raise DataError(f"it has no column '{column}'; its columns are: {', '.join(row) or 'none'}")
    return row[column]


def kind_of(value: Any) -> str:
    """What a cell holds, for a message."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
