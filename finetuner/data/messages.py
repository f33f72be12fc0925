"""Reads the conversation of a row, as chat templates take it: roles by their usual names, tool calls as values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetuner.data.content_pieces import PIECE_KEYS, is_text_piece, joined_pieces, system_text
from finetuner.data.formats.base import cell_of, kind_of
from finetuner.data.media import EDGES, find_placeholder, placeholder_message
from finetuner.data.message_edits import MessageEdits
from finetuner.data.message_shapes import columns_advice, shape_advice
from finetuner.data.roles import CALL_ROLES, RoleNames, unknown_role, words_in_quotes
from finetuner.data.row_files import Row
from finetuner.data.tool_calls import (
    call_list,
    calls_in_text,
    calls_of_function_call,
    parsed_json,
    require_inert,
    tool_list,
)
from finetuner.data.training_flags import FLAGS, read_flag
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry

Messages = list[dict[str, Any]]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what messages call a thought; the first is the templates'
FUNCTIONS = "functions"  # OpenAI's older column of tools
# Keys of a message as a template takes it that are the reader's own; all others are `extras`.
_OWN_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls"})
_PLAIN_KEYS = frozenset({"role", "content", "name"})


@dataclass(frozen=True)
class Conversation:
    """Messages and tools of a row. trained[i]: message i is trained on. plain: messages are a role and a text only.

    extras: further keys that messages have, which a template may know. ignored: keys that were left out, as
    `unused_columns` says.
    """

    messages: Messages
    trained: tuple[bool, ...]
    tools: list[Any] | None
    plain: bool
    extras: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()


def only_last_turn(conversation: Conversation) -> Conversation:
    """Return the conversation with the last of its trained messages alone trained on."""
    last = max((i for i, is_trained in enumerate(conversation.trained) if is_trained), default=-1)
    return replace(conversation, trained=tuple(i == last for i in range(len(conversation.trained))))


@dataclass(frozen=True)
class MessageReader:
    """Reads the messages of one dataset, by the names that its entry in the recipe gives.

    trains_all: the recipe says train_on_inputs, so that no message may ask not to be trained on.
    """

    column: str
    tools_column: str | None
    functions_column: str | None
    system_column: str | None
    role_key: str
    content_key: str
    mapped: tuple[tuple[str, str], ...]  # (a row's key, the template's) of other keys of a message
    flags: tuple[str, ...]
    left_out: frozenset[str]  # names in unused_columns
    ignores_all: bool  # unused_columns is `ignore`
    roles: RoleNames
    roles_to_train: frozenset[str]
    trains_all: bool
    edits: MessageEdits

    @classmethod
    def of(cls, entry: DatasetEntry, template: str = "", *, trains_all: bool = False) -> "MessageReader":
        """Return the reader of an entry's messages. `template`: the text of the chat template, for roles it knows."""
        roles = RoleNames.of(entry.roles, entry.roles_to_train, words_in_quotes(template))
        names = entry.message_property_mappings
        left_out = frozenset(entry.unused_names)
        own_flag = (entry.message_field_training,) if entry.message_field_training is not None else ()
        mapped = {
            "reasoning_content": names.reasoning_content,
            "tool_calls": names.tool_calls,
            "tool_call_id": names.tool_call_id,
            "name": names.name,
        }

        def unless_left_out(column: str) -> str | None:
            return None if column in left_out else column

        return cls(
            column=entry.field_messages,
            tools_column=unless_left_out(entry.field_tools),
            functions_column=unless_left_out(FUNCTIONS),
            system_column=unless_left_out(entry.field_system),
            role_key=names.role,
            content_key=names.content,
            mapped=tuple((given, key) for key, given in mapped.items() if given is not None and given != key),
            flags=tuple(name for name in dict.fromkeys((*own_flag, *FLAGS)) if name not in left_out),
            left_out=left_out,
            ignores_all=entry.unused_columns == "ignore",
            roles=roles,
            roles_to_train=frozenset(roles.find(role) or role for role in entry.roles_to_train),
            trains_all=trains_all,
            edits=MessageEdits.of(entry),
        )

    def read(self, row: Row) -> Conversation:
        """Return the conversation of a row. Raises DataError if a message is not one, or the tools are not a list."""
        return self.read_messages(row, _message_list(cell_of(row, self.column), self.column))

    def read_messages(self, row: Row, given: Sequence[Any], num_untrained: int = 0) -> Conversation:
        """Return the conversation of these messages with the row's system text and tools.

        num_untrained: so many of the first messages are not trained on, unless they say so themselves.
        """
        messages: Messages = []
        trained: list[bool] = []
        known, role_key, content_key, to_train = self.roles.known, self.role_key, self.content_key, self.roles_to_train
        num_plain = 0 if self.edits.splits_thoughts else 2
        for i, one in enumerate(given):
            if isinstance(one, dict) and len(one) == num_plain:  # nearly all messages: a role and a text
                name, content = one.get(role_key), one.get(content_key)
                if isinstance(name, str) and isinstance(content, str) and name in known:
                    role = known[name]
                    if role == "user" and (content[:1] in EDGES or content[-1:] in EDGES):
                        self._require_no_placeholder(i, content)
                    messages.append({"role": role, "content": content})
                    trained.append(role in to_train and i >= num_untrained)
                    continue
            message, is_trained = self._message(i, one, given)
            messages.append(message)
            if is_trained is None:
                is_trained = message["role"] in self.roles_to_train and i >= num_untrained
            trained.append(is_trained)
        if self.edits.splits_thoughts:
            messages = [self.edits.split(message) for message in messages]
        if self.system_column is not None and row.get(self.system_column) not in (None, ""):
            self._put_system_text(row, messages, trained)
        if self.edits.drops_system and messages[0]["role"] == "system":
            messages, trained = messages[1:], trained[1:]
            if not messages:
                raise DataError("the system message, which drop_system_message leaves out, is all that it has")
        keys = set().union(*messages)
        ignored: tuple[str, ...] = ()
        if self.left_out:
            found = {key for one in given if isinstance(one, dict) for key in one if key in self.left_out}
            ignored = tuple(f"messages[].{key}" for key in sorted(found))
        tools = self._tools(row)
        if len(keys) == 2 and not ignored:
            return Conversation(messages, tuple(trained), tools, plain=True)
        extras = frozenset(keys - _OWN_KEYS)
        return Conversation(messages, tuple(trained), tools, keys <= _PLAIN_KEYS, extras, ignored)

    def _message(self, i: int, given: Any, all_given: Sequence[Any]) -> tuple[dict[str, Any], bool | None]:
        """Return message `i` as a template takes it, and whether its own key says that it is trained on.

        None: it has no such key. Raises DataError if it is no message.
        """
        # a key that is null is one that the message has not
        message = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
        if self.left_out:
            message = {key: value for key, value in message.items() if key not in self.left_out}
        is_trained = self._take_flag(i, message)
        self._take_calls(i, message)
        name, content = self._take_role_and_content(i, message, given)
        role = self.roles.find(name)
        if role is None and name.lower() in CALL_ROLES:
            if message.get("tool_calls"):
                raise DataError(f"message {i} has the role '{name}' and 'tool_calls' too. Remove one of them")
            message["tool_calls"] = calls_in_text(content, i)
            role, content = "assistant", ""
        if role is None:
            raise unknown_role(i, name, [one.get(self.role_key) for one in all_given if isinstance(one, dict)])
        self._take_thoughts(i, message)
        _require_own_place(i, message, role, given)
        if role == "user":
            self._require_no_placeholder(i, content)
        if "tool_calls" in message:
            message["tool_calls"] = call_list(message["tool_calls"], i, self.left_out, ignores_all=self.ignores_all)
        return {"role": role, "content": content, **message}, is_trained

    def _take_flag(self, i: int, message: dict[str, Any]) -> bool | None:
        """Take the keys out of a message that say whether it is trained on, and return what they say."""
        is_trained = read_flag(self.flags, message, f"message {i}")
        if is_trained is False and self.trains_all:
            raise DataError(
                f"message {i} says that it is not trained on, and the recipe's train_on_inputs that all is. Remove one"
            )
        for name in self.flags:
            message.pop(name, None)
        return is_trained

    def _take_calls(self, i: int, message: dict[str, Any]) -> None:
        """Bring keys under other names to the template's: mapped ones, and OpenAI's older `function_call`."""
        for given, key in self.mapped:
            if given in message:
                if key in message:
                    raise DataError(f"message {i} has '{key}', and '{given}' that is mapped to it. Remove one")
                message[key] = message.pop(given)
        if "function_call" in message:
            call = message.pop("function_call")
            if message.get("tool_calls"):
                raise DataError(f"message {i} has 'function_call' and 'tool_calls'. Remove one of them")
            if call not in ("", {}):
                message["tool_calls"] = calls_of_function_call(call, i)
        if message.get("tool_calls") in ([], ""):
            del message["tool_calls"]

    def _take_role_and_content(self, i: int, message: dict[str, Any], given: Any) -> tuple[str, str]:
        """Take role and text out of a message; a content in pieces is joined. Raises DataError if one is missing."""
        role, content = message.pop(self.role_key, None), message.pop(self.content_key, None)
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, list):
            content = joined_pieces(self._known_pieces(content, i), message, i)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"message {i} of column '{self.column}' must have text in '{self.role_key}' and '{self.content_key}'; "
                f"it is {given!r:.150}{shape_advice(given, self.column, self.role_key)}"
            )
        for key, read in (("role", self.role_key), ("content", self.content_key)):
            if key in message:
                raise DataError(
                    f"message {i} has '{key}' beside '{read}', which message_property_mappings reads. Remove one, or "
                    f"write `unused_columns: [{key}]`"
                )
        return role, content

    def _leaves_out(self, name: str) -> bool:
        return self.ignores_all or name in self.left_out

    def _known_pieces(self, pieces: list[Any], i: int) -> list[Any]:
        """Return the pieces of a content. Raises DataError for one of text that says more than its text."""
        for piece in pieces:
            if isinstance(piece, dict) and is_text_piece(piece):
                cells = {key: value for key, value in piece.items() if not self._leaves_out(key)}
                require_inert(cells, PIECE_KEYS, f"a part of the content of message {i}")
        return pieces

    def _take_thoughts(self, i: int, message: dict[str, Any]) -> None:
        """Bring the thought under the template's name for it. Raises DataError if there are several unequal ones."""
        found = {name: message.pop(name) for name in THOUGHTS if name in message}
        if not found:
            return
        thought = next((value for value in found.values() if value != ""), "")
        for name, value in found.items():
            if not isinstance(value, str):
                raise DataError(f"message {i}: '{name}' is {value!r:.60}, but a thought must be text")
            if value not in ("", thought):
                raise DataError(f"message {i} has unequal thoughts: {', '.join(found)}. Leave one")
        message[THOUGHTS[0]] = thought

    def _require_no_placeholder(self, i: int, content: str) -> None:
        found = find_placeholder(content)
        if found is not None and not self._leaves_out(found):
            raise DataError(placeholder_message(f"message {i}", found))

    def _put_system_text(self, row: Row, messages: Messages, trained: list[bool]) -> None:
        """Put the row's system text before its messages, unless they begin with it."""
        text = system_text(row[self.system_column or ""])
        if not isinstance(text, str):
            raise DataError(f"column '{self.system_column}' holds {kind_of(text)}, but must be the system text")
        if not text.strip():
            return
        if messages and messages[0]["role"] in ("system", "developer"):
            own = messages[0]["content"]
            if own.strip() != text.strip():
                raise DataError(
                    f"column '{self.system_column}' says {text!r:.60}, and the messages begin with another system "
                    f"text: {own!r:.60}. Remove one, or write `unused_columns: [{self.system_column}]`"
                )
            return
        messages.insert(0, {"role": "system", "content": text})
        trained.insert(0, "system" in self.roles_to_train)

    def _tools(self, row: Row) -> list[Any] | None:
        column, name = self.tools_column, self.functions_column
        tools = tool_list(row[column], column) if column is not None and row.get(column) else None
        if name is None or not row.get(name) or name == self.column:
            return tools
        functions = tool_list(row[name], name)
        if tools is not None and functions is not None and tools != functions:
            raise DataError(
                f"columns '{self.tools_column}' and '{name}' hold different tools. Remove one, or write "
                f"`unused_columns: [{name}]`"
            )
        return tools or functions


def _message_list(cell: Any, column: str) -> list[Any]:
    if isinstance(cell, str) and cell.lstrip()[:1] == "[":  # as CSV and some tables hold them
        cell = parsed_json(cell, f"column '{column}'")
    if not isinstance(cell, list) or not cell:
        what = "an empty list" if cell == [] else kind_of(cell)
        raise DataError(f"column '{column}' holds {what}, but must be a list of messages{columns_advice(cell, column)}")
    return cell


def _require_own_place(turn: int, message: dict[str, Any], role: str, given: Any) -> None:
    """Raise DataError for a thought or a call of someone who is not the model: a template does not write it."""
    if role not in ("system", "developer", "user", "tool"):
        return
    for key in (THOUGHTS[0], "tool_calls"):
        if message.get(key):
            key = next((name for name in ("function_call", *THOUGHTS) if given.get(name)), key)
            raise DataError(
                f"message {turn} of the role '{role}' has '{key}', which only answers have: it would be left out. "
                f"Remove it, or write `unused_columns: [{key}]`"
            )
