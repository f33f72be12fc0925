"""`type: alpaca`: columns instruction, input (may be missing, null or empty) and output, which is trained on.

The prompt is Stanford Alpaca's (github.com/tatsu-lab/stanford_alpaca), with and without an input. LLaMA-Factory's two
further columns may be there: a `system` text stands in the place of the introduction, as it does there, and the
questions and answers of `history` stand before the instruction, each answer with its end-of-text. They are not
trained on.
"""

from typing import TYPE_CHECKING, Any

from finetuner.data.column_advice import column_advice
from finetuner.data.formats.base import Rendered, Renderer, Span, answered, kind_of, text_of
from finetuner.data.formats.instruction import fill, require_no_placeholder
from finetuner.data.row_files import Row
from finetuner.data.stanford_prompt import INTRO, INTRO_WITH_INPUT, TURN, TURN_WITH_INPUT
from finetuner.data.tool_calls import parsed_json
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPTS = {
    False: f"{INTRO}\n\n{TURN}",
    True: f"{INTRO_WITH_INPUT}\n\n{TURN_WITH_INPUT}",
}  # with an input?


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of Alpaca rows."""
    end, left_out = str(tokenizer.eos_token or ""), entry.unused_names

    def cell(row: Row, column: str) -> Any:
        return None if column in left_out else row.get(column)

    def render(row: Row) -> Rendered:
        if "output" not in row:
            advice = column_advice(entry, list(row)).removesuffix(".")
            raise DataError(f"it has no column 'output'; its columns are: {', '.join(row)}. {advice}")
        require_no_placeholder(row, ("instruction", "input"), entry)
        given = cell(row, "input")
        cells = {"instruction": text_of(row, "instruction"), "input": "" if given is None else text_of(row, "input")}
        answer, has_input = text_of(row, "output"), cells["input"] != ""
        system, history = cell(row, "system"), cell(row, "history")
        if system in (None, "") and history in (None, "", []):  # nearly all rows
            prompt, contents = fill(_PROMPTS[has_input], cells)
            return answered(prompt, answer, tuple(contents))
        text, contents = _beginning(system, has_input)
        for question, reply in earlier_turns(history):
            _append(text, contents, TURN, {"instruction": question})
            _append(text, contents, "{input}" + end + "\n\n", {"input": reply})
        _append(text, contents, TURN_WITH_INPUT if has_input else TURN, cells)
        return answered("".join(text), answer, tuple(contents))

    return render


def _beginning(system: Any, has_input: bool) -> tuple[list[str], list[Span]]:
    """Return the text before the first turn, in pieces, and the spans of it that are a row's."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return [(INTRO_WITH_INPUT if has_input else INTRO) + "\n\n"], []
    if not isinstance(system, str):
        raise DataError(f"column 'system' holds {kind_of(system)}, but must be text")
    return [system + "\n\n"], [(0, len(system))]


def _append(text: list[str], contents: list[Span], pattern: str, cells: dict[str, str]) -> None:
    """Add a filled pattern to the pieces of a text, and the spans of its fillings."""
    start = sum(map(len, text))
    filled, spans = fill(pattern, cells)
    text.append(filled)
    contents += [(start + a, start + b) for a, b in spans]


def earlier_turns(history: Any) -> list[tuple[str, str]]:
    """Return (question, answer) for each earlier turn of a column `history`: [[question, answer], ...], or its JSON.

    Raises DataError if it is something else.
    """
    if isinstance(history, str) and history.strip():
        history = parsed_json(history, "column 'history'")
    if not history:
        return []
    turns = history if isinstance(history, list) else [history]
    for turn in turns:
        if not isinstance(turn, list | tuple) or [type(text) for text in turn] != [str, str]:
            raise DataError(f"column 'history' must be a list of [question, answer]; it has {turn!r:.100}")
    return [(question, answer) for question, answer in turns]
