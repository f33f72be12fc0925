"""Recognize rows that lie in a file in another layout than one object a row, and say how to write them."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetuner.data.inert_names import snake_case
from finetuner.data.message_shapes import CHAT_COLUMNS, conversation_in
from finetuner.recipe.sections import DatasetEntry

_AS_LINES = "df.to_json(FILE, orient='records', lines=True) in pandas"
_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def layout_problem(entry: DatasetEntry, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what is wrong with the layout of a source's first rows; None if each looks like a row.

    Said only of rows that lack a column that the entry needs, or of a single row that holds a table.
    """
    if not rows:
        return None
    first, needed = rows[0], entry.required_columns
    names = dict.fromkeys(name for row in rows for name in row)
    if all(name in names for name in needed):
        return _table_by_columns(entry, first) if len(rows) == 1 else None
    chat = conversation_in(first) if entry.type == "chat_template" else None
    if chat is not None:
        return chat
    under_a_key = _table_of_pandas(first) or _rows_under_a_key(first) if len(rows) == 1 else None
    return under_a_key or _one_column(names) or _messages(first)


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(str(key).isdigit() for key in value)


def _table_by_columns(entry: DatasetEntry, row: Mapping[str, Any]) -> str | None:
    cells = [row[name] for name in entry.required_columns]
    is_text = entry.row_format in ("alpaca", "completion", "instruction", "prompt_completion")
    in_lists = all(isinstance(cell, list) for cell in cells) and (
        all(isinstance(item, str) for cell in cells for item in cell)
        if is_text
        else all(cell and all(isinstance(item, list) for item in cell) for cell in cells)
    )
    if cells and (all(map(_is_numbered, cells)) or (in_lists and entry.type is not None)):
        return f"It is one table, written column by column, and no row.\nWrite a row as an object: {_AS_LINES}"
    return None


def _table_of_pandas(row: Mapping[str, Any]) -> str | None:
    if {"columns", "data"} <= row.keys() and isinstance(row["data"], list):
        return f"It is one table of pandas (orient='split'), and no row.\nWrite a row as an object: {_AS_LINES}"
    if _is_numbered(row) and all(isinstance(value, dict) for value in row.values()):
        return f"Its rows lie under numbers (pandas' orient='index').\nWrite a row as an object: {_AS_LINES}"
    return None


def _rows_under_a_key(row: Mapping[str, Any]) -> str | None:
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value[:10]):
            if _messages(value[0]) is not None or snake_case(key) in CHAT_COLUMNS:
                return None
            inner = ", ".join(list(value[0])[:8])
            return (
                f"Its key '{key}' holds a list of {len(value):,} objects, with the keys {inner}: are these the rows?\n"
                f"Write them as lines: jq -c '.[\"{key}\"][]' FILE > NEW"
            )
    splits = [key for key, value in row.items() if isinstance(value, dict)]
    if splits and len(splits) == len(row):
        return f"Its keys ({', '.join(splits[:5])}) hold objects: are these the rows?\nWrite them as lines: jq -c '.[]'"
    return None


def _one_column(names: Mapping[str, Any]) -> str | None:
    if len(names) == 1:
        (name,) = names
        for delimiter, word in _DELIMITERS.items():
            if delimiter in name:
                return f"Its first line holds {word}, as those do that separate columns."
    return None


def _messages(row: Mapping[str, Any]) -> str | None:
    for role, content in (("role", "content"), ("from", "value")):
        if role in row and content in row:
            return (
                "Its rows look like messages, and a row is a conversation.\n"
                "`type: chat_template` takes a list of messages as one: write one list a line"
            )
    return None
