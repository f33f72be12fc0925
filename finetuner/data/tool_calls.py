"""Tool calls and tools of a row, in the form in which chat templates take them."""

import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from finetuner.data.formats.base import kind_of
from finetuner.data.inert_names import in_yaml_list, is_empty, is_inert
from finetuner.errors import DataError

_PRINTED = re.compile(r"\s*[\[{]+\s*'")  # a list or dict as Python prints it
_WRITTEN = ("type", "name")  # what templates write of a call, beside its arguments
_ARGUMENTS = ("arguments", "parameters")  # the second in Llama 3's form


def call_list(calls: Any, turn: int, left_out: Container[str], *, ignores_all: bool) -> list[dict[str, Any]]:
    """Return the calls of message `turn`, without the keys in `left_out`.

    Raises DataError if they are no list of calls, or, unless `ignores_all`, one says more than a template writes.
    """
    if not isinstance(calls, list):
        raise DataError(f"message {turn}: 'tool_calls' is {calls!r:.60}, but must be a list of calls")
    return [_tool_call(call, turn, left_out, ignores_all) for call in calls]


def calls_in_text(text: str, turn: int) -> list[Any]:
    """Return the calls that a text spells as JSON: one, or a list."""
    calls = parsed_json(text, f"message {turn}, a tool call,")
    return calls if isinstance(calls, list) else [calls]


def calls_of_function_call(call: Any, turn: int) -> list[Any]:
    """Return the one call of OpenAI's older key `function_call`, an object or its JSON."""
    return calls_in_text(call, turn) if isinstance(call, str) else [call]


def _tool_call(call: Any, turn: int, left_out: Container[str], ignores_all: bool) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}, the arguments as they are given, an object or its JSON.

    data/tool_arguments.py gives them to the template in the form that it takes. Nulls stand for keys that a call has
    not; in the arguments they are values.
    """
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"message {turn}: a tool call must have a 'name'; it is {call!r:.150}")
    name = next((key for key in _ARGUMENTS if function.get(key) is not None), None)
    arguments = {} if name is None else function[name]
    outer = {k: v for k, v in call.items() if v is not None and k not in ("function", "name", name)}
    inner = {k: v for k, v in function.items() if v is not None and k not in ("type", "id", name)}
    for keys in (outer, inner):
        for key in [key for key in keys if key not in _WRITTEN and key in left_out]:
            del keys[key]
    if not ignores_all:
        require_inert({**outer, **inner}, _WRITTEN, f"a tool call of message {turn}")
    return {"type": "function", **outer, "function": {**inner, "arguments": arguments}}


def require_inert(cells: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise DataError for a cell that says something, under a name that is neither among `known` nor inert."""
    for key, value in cells.items():
        if key not in known and not is_inert(key) and not is_empty(value):
            raise DataError(
                f"{where} has '{key}' ({value!r:.60}), which is not written, so it would be left out. "
                f"Rename it to what it is, or write `unused_columns: {in_yaml_list([key])}` beside `path`"
            )


def tool_list(cell: Any, column: str) -> list[Any] | None:
    """Return the tools in a cell, each {"type": "function", "function": {...}}; None if there are none.

    Raises DataError if the cell is neither a list nor the JSON of one.
    """
    if isinstance(cell, str):
        cell = parsed_json(cell, f"column '{column}'") if cell.strip() else None
    if cell is not None and not isinstance(cell, list):
        raise DataError(f"column '{column}' holds {kind_of(cell)}, but must be a list of tools")
    tools = [parsed_json(tool, f"column '{column}'") if isinstance(tool, str) else tool for tool in cell or ()]
    return [_tool(tool) if isinstance(tool, dict) and "function" not in tool else tool for tool in tools] or None


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool in OpenAI's form. Anthropic's name for its parameters is `input_schema`."""
    renamed = "input_schema" if "parameters" not in tool else ""
    given = {"parameters" if k == renamed else k: v for k, v in tool.items() if (k, v) != ("type", "function")}
    return {"type": "function", "function": given}


def parsed_json(text: str, what: str) -> Any:
    """Return the value of a JSON text. Raises DataError if it is none; `what`: what the text is."""
    try:
        return json.loads(text)
    except ValueError as error:
        hint = ". It looks like what Python prints of a value: write it with json.dumps" if _PRINTED.match(text) else ""
        raise DataError(f"{what} is not JSON ({error}): {text!r:.80}{hint}") from None
