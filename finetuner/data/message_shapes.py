"""Advice for lists that are conversations in another shape than messages with a role and a text."""

from collections.abc import Mapping
from typing import Any

from finetuner.data.inert_names import in_yaml_list, is_inert, snake_case

_ROLES = ("role", "from", "speaker", "author", "sender", "role_name")
_CONTENTS = ("content", "value", "text", "message", "utterance", "parts", "body")
# Columns that hold a conversation, in snake case; the most telling first.
CHAT_COLUMNS = (
    "messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "turns", "chat", "chat_history",
    "contents",
)  # fmt: skip
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction", "preamble")
# Keys of one question and its answer.
_PAIRS = (
    ("input", "output"), ("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("prompt", "response"),
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("human", "gpt"),
    ("query", "response"),
)  # fmt: skip


def conversation_in(row: Mapping[str, Any]) -> str | None:
    """Return what to write for a row of a chat whose messages are not where the entry looks; None if there are none."""
    if isinstance(row.get("prompt"), Mapping) and isinstance(row["prompt"].get("replies"), list):
        return (
            "They are trees of messages, of which each path from 'prompt' along 'replies' is a conversation.\n"
            "Write each path that is to be learned as a row of its own, {messages: [{role, content}, ...]}"
        )
    asked = row.get("prompt")
    if isinstance(asked, list) and asked and isinstance(asked[0], Mapping) and "completion" not in row:
        return (
            "Column 'prompt' holds messages without an answer, as reinforcement learning (GRPO) has them, which is not "
            "supported yet.\n"
            "To learn an answer: write it as the last message, and `field_messages: prompt`"
        )
    if isinstance(row.get("role"), str) and "parent_id" in row:
        return (
            "A row is one message of a tree, and a row must be a conversation.\n"
            "Follow 'parent_id' from each last answer to its first question, and write that path as "
            "{messages: [{role, content}, ...]}"
        )
    for name in sorted((name for name in row if snake_case(name) in CHAT_COLUMNS), key=_rank):
        cell = row[name]
        if isinstance(cell, list) and cell:
            return _advice_for_list(row, name, cell[0])
        if isinstance(cell, str) and cell.lstrip()[:1] != "[":
            return (
                f"Column '{name}' holds a conversation as one text, and not a list of messages.\n"
                f"`type: completion` with `field: {name}` trains on all of it, questions too. To train on answers "
                "alone, write it as messages: {messages: [{role, content}, ...]}"
            )
    return None


def _rank(name: str) -> int:
    return CHAT_COLUMNS.index(snake_case(name))


def _advice_for_list(row: Mapping[str, Any], name: str, element: Any) -> str | None:
    system = next((column for column in row if snake_case(column) in _SYSTEM_COLUMNS and column != "system"), None)
    more = "" if system is None else f" and `field_system: {system}`"
    advice = shape_advice(element, name)
    if not advice and not (isinstance(element, Mapping) and {"role", "content"} <= element.keys()):
        return None
    return f"Write `field_messages: {name}`{more}{advice}"


def shape_advice(given: Any, column: str, role_key: str = "role") -> str:
    """Return what to write for a row whose list `column` has this element, which is no message; "" if nobody knows.

    It begins a new line.
    """
    if isinstance(given, str):
        to_message = '{role: (if $i % 2 == 0 then "user" else "assistant" end), content: .[$i]}'
        made = f"[range(length) as $i | {to_message}]"
        return _command("It is a list of texts, with no word of who speaks. If it begins with the user", column, made)
    if not isinstance(given, Mapping):
        return ""
    keys = {key for key, value in given.items() if value is not None}
    for asked, answered in _PAIRS:
        if {asked, answered} <= keys and all(is_inert(key) for key in keys - {asked, answered}):
            turns = f'{{role: "user", content: .{asked}}}, {{role: "assistant", content: .{answered}}}'
            return _command("It is a question and its answer", column, f"[.[] | {turns}]")
    role, content = _find(given, _ROLES), _find(given, _CONTENTS)
    if content is None or (role is None and role_key != "role"):
        return ""
    if role is None:
        return f".\nIt does not say who speaks: give each a `role`. Its keys: {in_yaml_list(list(given))}"
    names = {"role": role, "content": content}
    listed = ", ".join(f"{key}: {name}" for key, name in names.items() if key != name)
    if not listed:
        return "" if role_key == "role" else ".\nIts keys are the usual ones: remove `message_property_mappings`"
    return f".\nWrite `message_property_mappings: {{{listed}}}` beside `field_messages`"


def columns_advice(cell: Any, column: str) -> str:
    """Return what to write for messages as a table holds them, {"role": [...], "content": [...]}; "" for others."""
    if not isinstance(cell, Mapping) or not cell or not all(isinstance(inner, list) for inner in cell.values()):
        return ""
    made = "[to_entries | [.[].key] as $keys | [.[].value] | transpose[] | [$keys, .] | transpose | "
    made += "map({key: .[0], value: .[1]}) | from_entries]"
    return _command("It is a list for each key", column, made)


def _find(element: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if element.get(name) is not None), None)


def _command(what: str, column: str, made: str) -> str:
    return f".\n{what}, write it as messages: jq -c '.[\"{column}\"] |= {made}' FILE > NEW"
