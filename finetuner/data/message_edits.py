"""Changes that an entry of the recipe asks for in its messages: other keys' names, thoughts split off, no system."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry

Message = dict[str, Any]

# The marks around a thought in an answer's text, and around the answer behind it, as rows of 2024 and 2025 have them;
# Axolotl's split_thinking looks for the same (prompt_strategies.chat_template of 0.19.0).
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_ANSWER = ("<|begin_of_solution|>", "<|end_of_solution|>")


@dataclass(frozen=True)
class MessageEdits:
    """The changes of one dataset. names: a message's key -> the usual one, for keys besides role and content."""

    names: Mapping[str, str]
    splits_thoughts: bool
    drops_system: bool

    @classmethod
    def of(cls, entry: DatasetEntry) -> "MessageEdits":
        """Return the changes that an entry asks for."""
        given = entry.message_property_mappings
        names = {
            given.reasoning_content: "reasoning_content",
            given.tool_calls: "tool_calls",
            given.tool_call_id: "tool_call_id",
            given.name: "name",
        }
        others = {theirs: usual for theirs, usual in names.items() if theirs is not None and theirs != usual}
        return cls(others, entry.split_thinking, entry.drop_system_message)

    def renamed(self, message: Message) -> Message:
        """Return a message with its keys under their usual names. Raises DataError if it says a thing under both."""
        found = {usual: message[theirs] for theirs, usual in self.names.items() if message.get(theirs) is not None}
        for usual, value in found.items():
            if message.get(usual) not in (None, value):
                raise DataError(f"a message has '{usual}' and the key that message_property_mappings names for it")
        return {key: value for key, value in message.items() if key not in self.names} | found

    def first_kept(self, messages: list[Message]) -> int:
        """Return the number of messages to leave out at the beginning: 1 for a system message, or 0."""
        return int(self.drops_system and bool(messages) and messages[0]["role"] == "system")

    def split(self, message: Message) -> Message:
        """Return an answer with the thought in its text as its reasoning_content."""
        content = message["content"]
        if not self.splits_thoughts or message["role"] != "assistant":
            return message
        for begin, end in _THOUGHTS:
            if begin in content and end in content[content.find(begin) :]:
                thought, _, rest = content.partition(begin)[2].partition(end)
                return {**message, "reasoning_content": thought.strip(), "content": _answer(rest.lstrip())}
        return message


def _answer(text: str) -> str:
    """The text between the marks of an answer, or all of it."""
    begin, end = _ANSWER
    if begin not in text or end not in text:
        return text
    return text.partition(begin)[2].partition(end)[0].strip()
