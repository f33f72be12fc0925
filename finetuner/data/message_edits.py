"""Changes that an entry of the recipe asks for in its messages: thoughts split off their text, no system message."""

from dataclasses import dataclass
from typing import Any

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
    """The changes of one dataset."""

    splits_thoughts: bool
    drops_system: bool

    @classmethod
    def of(cls, entry: DatasetEntry) -> "MessageEdits":
        """Return the changes that an entry asks for."""
        return cls(entry.split_thinking, entry.drop_system_message)

    def split(self, message: Message) -> Message:
        """Return an answer with the thought in its text as its reasoning_content."""
        content = message["content"].lstrip()
        if message["role"] != "assistant":
            return message
        for begin, end in _THOUGHTS:
            if content.startswith(begin) and end in content:
                thought, _, rest = content.removeprefix(begin).partition(end)
                return {**message, "reasoning_content": thought.strip(), "content": _answer(rest.lstrip())}
        return message


def _answer(text: str) -> str:
    """The text between the marks of an answer, if they are around all of it; else the text."""
    begin, end = _ANSWER
    stripped = text.strip()
    is_marked = stripped.startswith(begin) and stripped.endswith(end)
    return stripped.removeprefix(begin).removesuffix(end).strip() if is_marked else text
