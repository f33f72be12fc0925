"""The contract of a dataset format: a row in, its text and the characters that are trained on out.

A format knows nothing of tokens; data/encoding.py tokenizes what it renders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuner.data.row_files import Row
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # [start, stop) in characters


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    spans: the characters that are trained on. wraps: the tokenizer adds its own begin and end of text; a chat template
    writes them itself, so that a second BOS would be one too many. contents: the text that came from the row's cells,
    in which words that look like special tokens are words. roles: the role of each message, for counting. ignored:
    columns ("id") and keys of messages ("messages[].id") that the row has and that are inert: nothing is lost without
    them. left_out_thoughts: thoughts of the row that its template does not write.
    """

    text: str
    spans: tuple[Span, ...]
    wraps: bool
    contents: tuple[Span, ...] = ()
    roles: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    left_out_thoughts: int = 0


Renderer = Callable[[Row], Rendered]  # raises DataError for a row that cannot become text
# (entry, section, tokenizer) -> its rows' renderer; raises DataError if the tokenizer cannot render them
BuildRenderer = Callable[[DatasetEntry, DataSection, "PreTrainedTokenizerBase"], Renderer]


def answered(prompt: str, answer: str, contents: tuple[Span, ...] | None = None) -> Rendered:
    """A prompt and, trained on, its answer. `contents` of the prompt: all of it where it is not given."""
    stop = len(prompt) + len(answer)
    if contents is None:
        return Rendered(prompt + answer, ((len(prompt), stop),), wraps=True, contents=((0, stop),))
    return Rendered(prompt + answer, ((len(prompt), stop),), wraps=True, contents=(*contents, (len(prompt), stop)))


def text_of(row: Row, column: str) -> str:
    """The text in a cell. Raises DataError if the row has no such column, or something else in it."""
    value = cell_of(row, column)
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {kind_of(value)}, but must be text{_text_advice(value, column)}")
    return value


def _text_advice(value: Any, column: str) -> str:
    """Return how a cell of another kind becomes a text, after a full stop; "" if that is not plain."""
    if isinstance(value, float) and math.isnan(value):
        return ". NaN is an empty cell of a table: write null, or leave the key out"
    inner = value.get("text") if isinstance(value, dict) else value
    at = f'.["{column}"]' + ".text" * isinstance(value, dict)
    if isinstance(inner, list) and inner and all(isinstance(text, str) for text in inner):
        return f". To take the first of its texts: jq -c '.[\"{column}\"] = {at}[0]' FILE > NEW"
    if isinstance(value, int | float):
        return f". Write it as the words that are to be learned, or as it is: jq -c '{at} |= tostring' FILE > NEW"
    return ""


def cell_of(row: Row, column: str) -> Any:
    """The value of a cell. Raises DataError if the row has no such column."""
    if column not in row:
        raise DataError(f"it has no column '{column}'; its columns are: {', '.join(row) or 'none'}")
    return row[column]


def beginning_of(value: Any) -> str:
    """The beginning of a value as Python writes it, for a message; one that is nested too deep has its type alone."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return f"a {type(value).__name__} nested too deep to show"


def kind_of(value: Any) -> str:
    """A cell's type and the beginning of its value, in words for a message."""
    return "nothing" if value is None else f"{type(value).__name__} {beginning_of(value)}"
