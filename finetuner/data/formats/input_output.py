"""`type: input_output`: a column `segments` of {text, label}, joined as they are; those with a true label are trained
on. Begin and end of text are up to the row."""

from typing import TYPE_CHECKING

from finetuner.data.formats.base import Rendered, Renderer, cell_of, kind_of
from finetuner.data.row_files import Row
from finetuner.data.tool_calls import require_inert
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of labeled segments."""
    left_out = None if entry.unused_columns == "ignore" else frozenset(entry.unused_names)
    return lambda row: _render(row, left_out)


def _render(row: Row, left_out: frozenset[str] | None) -> Rendered:
    """Return a row's text. left_out: keys of segments that the recipe leaves out; None: all but text and label."""
    segments = cell_of(row, "segments")
    if not isinstance(segments, list) or not segments:
        raise DataError(f"column 'segments' holds {kind_of(segments)}, but must be a list of {{text, label}}")
    text, spans = "", []
    for i, segment in enumerate(segments):
        piece = segment.get("text") if isinstance(segment, dict) else None
        if not isinstance(piece, str) or not isinstance(segment.get("label"), bool):
            raise DataError(
                f"segment {i} must have text in 'text', and true or false in 'label'; it is {segment!r:.150}"
            )
        if len(segment) > 2 and left_out is not None:
            require_inert({k: v for k, v in segment.items() if k not in left_out}, ("text", "label"), f"segment {i}")
        if segment["label"]:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, tuple(spans), wraps=False)
