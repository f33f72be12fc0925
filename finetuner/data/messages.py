"""Reads the conversation of a row, as chat templates take it: roles by their usual names, tool calls as values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetuner.data.formats.base import cell_of, kind_of
from finetuner.data.message_edits import MessageEdits
from finetuner.data.row_files import Row
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry

Messages = list[dict[str, Any]]

# The names that data sets of the ShareGPT kind give to roles.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
TOOL_CALL_ROLE = "function_call"  # a turn of ShareGPT data whose text is the JSON of a call
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what messages call a thought; the first is the templates'
TRAINING_KEYS = ("train", "weight")  # read where they stand; `weight` is the OpenAI format's word


@dataclass(frozen=True)
class Conversation:
    """Messages and tools of a row. trained[i]: message i is trained on. plain: messages are a role and a text only."""

    messages: Messages
    trained: tuple[bool, ...]
    tools: list[Any] | None
    plain: bool


@dataclass(frozen=True)
class MessageReader:
    """Reads the messages of one dataset, by the names that its entry in the recipe gives."""

    column: str
    tools_column: str
    role_key: str
    content_key: str
    training_key: str | None
    roles: Mapping[str, str]  # a row's name of a role -> the template's
    roles_to_train: frozenset[str]
    edits: MessageEdits

    @classmethod
    def of(cls, entry: DatasetEntry) -> "MessageReader":
        """Return the reader of an entry's messages."""
        names = {name: role for role, given in entry.roles.items() for name in given}
        roles = ROLES | names
        return cls(
            column=entry.field_messages,
            tools_column=entry.field_tools,
            role_key=entry.message_property_mappings.role,
            content_key=entry.message_property_mappings.content,
            training_key=entry.message_field_training,
            roles=roles,
            roles_to_train=frozenset(roles.get(role, role) for role in entry.roles_to_train),
            edits=MessageEdits.of(entry),
        )

    def read(self, row: Row) -> Conversation:
        """Return the conversation of a row. Raises DataError if a message is not one, or the tools are not a list."""
        cell = cell_of(row, self.column)
        if not isinstance(cell, list) or not cell:
            raise DataError(f"column '{self.column}' holds {kind_of(cell)}, but must be a list of messages")
        messages: Messages = []
        trained = []
        for i, given in enumerate(cell):
            if self.edits.names and isinstance(given, dict):
                given = self.edits.renamed(given)
            message, is_trained = self._message(i, given)
            messages.append(self.edits.split(message))
            trained.append(message["role"] in self.roles_to_train if is_trained is None else is_trained)
        first = self.edits.first_kept(messages)
        messages, trained = messages[first:], trained[first:]
        if not messages:
            raise DataError(
                f"column '{self.column}' holds a system message alone, which drop_system_message leaves out"
            )
        plain = set().union(*messages) <= {"role", "content", "name"}
        return Conversation(messages, tuple(trained), self._tools(row.get(self.tools_column)), plain)

    def _message(self, i: int, given: Any) -> tuple[dict[str, Any], bool | None]:
        """Return message `i` as a template takes it, and whether its own key says that it is trained on.

        None: it has no such key. Raises DataError if it is no message.
        """
        if isinstance(given, dict) and len(given) == 2:  # nearly all messages: a role and a text
            role, content = given.get(self.role_key), given.get(self.content_key)
            if isinstance(role, str) and isinstance(content, str) and role != TOOL_CALL_ROLE:
                return {"role": self.roles.get(role, role), "content": content}, None
        # `datasets` gives every message the keys of all; a key that is null here was not in this one
        message = without_nulls(given) if isinstance(given, dict) else {}
        role, content = self._role_and_content(i, message, given)
        is_trained = self._is_trained(i, message)
        thought = next((message.pop(name) for name in THOUGHTS if name in message), None)
        if thought is not None:
            message[THOUGHTS[0]] = thought
        if role == TOOL_CALL_ROLE and role not in self.roles:
            message["tool_calls"] = _tool_calls(content, i)
            role, content = "assistant", ""
        if "tool_calls" in message:
            message["tool_calls"] = _call_list(message["tool_calls"], i)
        return {"role": self.roles.get(role, role), "content": content, **message}, is_trained

    def _role_and_content(self, i: int, message: dict[str, Any], given: Any) -> tuple[str, str]:
        """Take role and text out of a message; a content in pieces is joined. Raises DataError if one is missing."""
        role, content = message.pop(self.role_key, None), message.pop(self.content_key, None)
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, list):
            content = _joined(content, message, i)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"message {i} of column '{self.column}' must have text in '{self.role_key}' and '{self.content_key}'; "
                f"it is {given!r:.150}{_other_names(given)}"
            )
        return role, content

    def _is_trained(self, i: int, message: dict[str, Any]) -> bool | None:
        """Take the key out of a message that says whether it is trained on; None if it has none."""
        keys = (self.training_key,) if self.training_key is not None else TRAINING_KEYS
        for key in keys:
            if key in message:
                value = message.pop(key)
                if value not in (0, 1):
                    raise DataError(f"message {i}: '{key}' is {value!r:.60}, but must be true or false (1 or 0)")
                return bool(value)
        return None

    def _tools(self, cell: Any) -> list[Any] | None:
        if isinstance(cell, str):
            cell = _parsed(cell, f"column '{self.tools_column}'") if cell.strip() else None
        if cell is not None and not isinstance(cell, list):
            raise DataError(f"column '{self.tools_column}' holds {kind_of(cell)}, but must be a list of tools")
        tools = [without_nulls(tool) for tool in cell or ()]
        return [
            {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
            for tool in tools
        ] or None


def _other_names(given: Any) -> str:
    """A hint for a message in ShareGPT's words."""
    if isinstance(given, dict) and isinstance(given.get("from"), str) and isinstance(given.get("value"), str):
        return ".\nWrite `message_property_mappings: {role: from, content: value}` beside `field_messages`"
    return ""


def _joined(pieces: list[Any], message: dict[str, Any], turn: int) -> str:
    """The text of a content in pieces; thoughts and tool calls among them become keys of the message."""
    texts, thoughts, calls = [], [], []
    for piece in pieces:
        kind, value = _kind_and_text(piece, turn)
        if kind == "text":
            texts.append(value)
        elif kind == "tool_call":
            calls += _tool_calls(value, turn)
        else:
            thoughts.append(value)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return "".join(texts)


def _kind_and_text(piece: Any, turn: int) -> tuple[str, str]:
    """Return type and text of a piece of a content. Raises DataError if it is no text, such as an image."""
    if isinstance(piece, dict):
        value = piece.get("text") or piece.get("value") or piece.get("content") or ""
        if piece.get("type") in ("text", "reasoning", "thinking", "tool_call") and isinstance(value, str):
            return piece["type"], value
    raise DataError(f"message {turn}: this part of its content is not text: {piece!r:.150}")


def _tool_calls(text: str, turn: int) -> list[Any]:
    calls = _parsed(text, f"message {turn}, a tool call,")
    return calls if isinstance(calls, list) else [calls]


def _call_list(calls: Any, turn: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise DataError(f"message {turn}: 'tool_calls' is {calls!r:.60}, but must be a list of calls")
    return [_tool_call(call, turn) for call in calls]


def _tool_call(call: Any, turn: int) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}, the arguments being values: a template writes them as
    JSON, and a text would become a text within a text."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"message {turn}: a tool call must have a 'name'; it is {call!r:.150}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"message {turn}: the arguments of '{function['name']}'")
    outer = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    inner = {key: value for key, value in function.items() if key not in ("type", "id")}
    return {"type": "function", **outer, "function": {**inner, "arguments": arguments}}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what} is not JSON ({error}): {text!r:.80}") from None


def without_nulls(value: Any) -> Any:
    """Remove the null keys that a table adds to a row: it gives every block the keys of all blocks."""
    if isinstance(value, dict):
        return {
            key: inner if isinstance(inner, str) else without_nulls(inner)
            for key, inner in value.items()
            if inner is not None
        }
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
