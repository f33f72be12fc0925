"""Further keys of messages, beside role, text, thoughts and calls: read by the chat template, inert, or refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finetuner.data.inert_names import OTHER_THOUGHTS, in_yaml_list, is_empty, is_inert, snake_case
from finetuner.data.media import NOT_YET, is_media
from finetuner.data.messages import Conversation, Messages
from finetuner.data.template_sandbox import ChatTemplate, compile_template
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHTS = re.compile(OTHER_THOUGHTS)
_WHOLE_MESSAGES = re.compile(
    r"\b(messages?|msg|m)(\[[^]]*\])?\s*(\|\s*(tojson|string|items|dictsort)|\.(items|keys|values)\()"
)
# Inert in a message where the template does not read them: who spoke, which call is answered, a chat log's facts.
_INERT = frozenset(
    {
        "name",
        "tool_call_id",
        "state",
        "header",
        "turn_identifier",
        "status",
        "role_name",
        "parent",
        "token_counter",
    }
)


# Switches that are off in a message that has not them.
_OPPOSITE = re.compile(r"mask|ignore|skip|exclude|omit|no_|not_|disable")
_SWITCHES = frozenset({"prefix", "partial", "is_error"})


@dataclass(frozen=True)
class MessageKeys:
    """Decides on further keys of messages, with the tokenizer's chat template and its variables."""

    tokenizer: "PreTrainedTokenizerBase"
    variables: Mapping[str, Any]
    ignores_all: bool
    _templates: dict[str, ChatTemplate] = field(default_factory=dict)
    _mentioned: dict[tuple[str, str], bool] = field(default_factory=dict)  # (template, key) -> it has such a word
    _found: dict[tuple[str, str, str], bool] = field(default_factory=dict)  # (template, key, role) -> it is read

    def settle(self, conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """Return the conversation with the further keys that its template may read, and the names of those left out.

        Raises DataError if one is left out that holds something and is not inert.
        """
        messages, text = conversation.messages, str(self.tokenizer.get_chat_template(tools=conversation.tools))
        unknown, ignored = set(), []
        for key in sorted(conversation.extras):
            says_something = [
                i
                for i, one in enumerate(messages)
                if not is_empty(one.get(key)) and not (key in _SWITCHES and one[key] is False)
            ]
            if says_something and is_media(key) and not self.ignores_all:
                raise DataError(_refusal(says_something[0], key, messages[says_something[0]][key]))
            can_go = self.ignores_all or key in _INERT or is_inert(key)
            is_mentioned = self._is_mentioned(text, key)
            lost = [
                i
                for i in says_something
                if not (is_mentioned and self._is_read(text, conversation, i, key, once=can_go))
            ]
            if lost and not can_go:
                raise DataError(_refusal(lost[0], key, messages[lost[0]][key]))
            ignored += [f"messages[].{key}"] if lost else []
            unknown |= set() if is_mentioned else {key}
        if not unknown:
            return conversation, tuple(ignored)
        left: Messages = [{key: value for key, value in one.items() if key not in unknown} for one in messages]
        keys = set().union(*left)
        return replace(conversation, messages=left, plain=keys <= {"role", "content", "name"}), tuple(ignored)

    def _is_mentioned(self, text: str, key: str) -> bool:
        """Whether the template `text` has a word that may stand for this key; without one it cannot write it."""
        if (text, key) not in self._mentioned:
            word = re.escape(key)
            found = re.search(rf"\.\s*{word}\b|(['\"]){word}\1", text) or _WHOLE_MESSAGES.search(text)
            self._mentioned[text, key] = found is not None
        return self._mentioned[text, key]

    def _is_read(self, text: str, conversation: Conversation, turn: int, key: str, *, once: bool) -> bool:
        """Whether the template `text` writes another text without this key of message `turn`.

        once: an answer for one message is taken for all of the same role, since no harm is done if it is inert.
        """
        known = self._found.get((text, key, conversation.messages[turn]["role"]))
        if known or (known is False and once):
            return known
        if text not in self._templates:
            self._templates[text] = compile_template(text, {**self.tokenizer.special_tokens_map, **self.variables})
        template = self._templates[text]
        without = list(conversation.messages)
        without[turn] = {name: value for name, value in without[turn].items() if name != key}
        written = template.render(conversation.messages, conversation.tools)
        try:
            is_read = template.render(without, conversation.tools) != written
        except DataError:  # the template insists on the key
            is_read = True
        self._found[text, key, conversation.messages[turn]["role"]] = is_read
        return is_read


def _refusal(turn: int, key: str, value: Any) -> str:
    advice = ""
    snake = snake_case(key)
    if is_media(key):
        advice = f"{NOT_YET[0].upper()}{NOT_YET[1:]}. "
    elif _THOUGHTS.fullmatch(key):
        advice = f"A thought: `message_property_mappings: {{reasoning_content: {key}}}` gives it to the template. "
    elif isinstance(value, bool | int) and value in (0, 1) and not _OPPOSITE.search(snake):
        advice = f"If it says whether the message is trained on: `message_field_training: {key}`. "
    elif isinstance(value, bool | int) and value in (0, 1):
        advice = "If it says that the message is not trained on, write `train: false` in its place. "
    return (
        f"message {turn} has the key '{key}' ({value!r:.60}), which the chat template does not write, so it would be "
        f"left out. {advice}To train without: `unused_columns: {in_yaml_list([key])}` beside `path`"
    )
