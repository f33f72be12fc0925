"""What a row says beside the columns that its `type` reads: inert and counted, or an error that names it.

`inert_names` says which names are inert. A column whose text is in the rendered row already is lost by nobody either.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetuner.data.formats.base import Rendered
from finetuner.data.inert_names import OTHER_THOUGHTS, in_yaml_list, is_empty, is_inert, snake_case
from finetuner.data.media import NOT_YET, is_media
from finetuner.data.messages import FUNCTIONS
from finetuner.data.row_files import Row
from finetuner.data.training_flags import FLAGS, read_flag
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry, InstructionFormat

MAX_CACHED_PLANS = 1024
_PREFERENCES = re.compile(r"(chosen|rejected|kto_tag|preferred|dispreferred)(_(messages|response|answer|text))?")
_THOUGHTS = re.compile(r"(reasoning_content|thinking|reasoning|" + OTHER_THOUGHTS + ")")
_SYSTEM = frozenset({"system", "system_prompt", "system_message", "system_text", "system_instruction", "sys_prompt"})
_TOOLS = frozenset({"tools", "functions", "tool_list", "available_tools", "tool_definitions", "function_list", "apis"})
_TOKENS, _BLOCK = "rows of tokens", "the `type` block"
_MANY_CHARACTERS = 24  # a text as long as this does not stand in another one by chance


class _Plan(NamedTuple):
    """The columns of rows with certain columns: inert ones, flags, and those whose cell has to be looked at.

    not_yet: those among the last that this version can do nothing with.
    """

    inert: tuple[str, ...]
    flags: tuple[str, ...]
    suspicious: tuple[str, ...]
    not_yet: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the type reads every column."""
        return not (self.inert or self.flags or self.suspicious)


@dataclass(frozen=True)
class ColumnCheck:
    """Holds the rows of one entry against the columns that their type reads.

    used: those columns. used_by: the type, in words. left_out: names that the recipe leaves out; ignores_all: it leaves
    out all.
    """

    used: frozenset[str]
    used_by: str
    left_out: frozenset[str]
    ignores_all: bool
    is_chat: bool = False
    _plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: DatasetEntry, used: frozenset[str] | None = None) -> "ColumnCheck":
        """Return the check for an entry. `used`: the columns that are read, if not those of its type."""
        by = _TOKENS if entry.type is None else f"`type: {entry.type}`"
        return cls(
            used=(columns_of_type(entry) if used is None else used) - set(entry.unused_names),
            used_by=_BLOCK if isinstance(entry.type, InstructionFormat) else by,
            left_out=frozenset(entry.unused_names),
            ignores_all=entry.unused_columns == "ignore",
            is_chat=entry.type in ("chat_template", "prompt_completion", "instruction_chat"),
        )

    def knows_all(self, row: Row) -> bool:
        """Return whether the type reads every column of the row, so that there is nothing else to look at."""
        return self._plan(row).is_empty

    def is_trained(self, row: Row) -> bool:
        """Return whether the row is trained on, as far as a column of it says so; see `training_flags`."""
        flags = self._plan(row).flags
        return not flags or read_flag(flags, row, "the row") is not False

    def require_supported(self, row: Row) -> None:
        """Raise DataError for pictures, videos, sound and preferences: they explain other errors of their rows."""
        not_yet = self._plan(row).not_yet
        refused = [name for name in not_yet if not is_empty(row[name]) and not self._leaves_out(name)]
        if refused:
            raise DataError(self._message(row, refused))

    def _leaves_out(self, name: str) -> bool:
        return self.ignores_all or name in self.left_out

    def find_ignored(self, row: Row, rendered: Rendered | None) -> tuple[str, ...]:
        """Return the names of inert columns, and of those that hold a text that `rendered` has too.

        Raises DataError if there is another column that the type does not use.
        """
        plan = self._plan(row)
        if not plan.suspicious:
            return plan.inert
        ignored, refused = list(plan.inert), []
        for name in plan.suspicious:
            value = row[name]
            if is_empty(value):
                continue
            if self._leaves_out(name) or _is_written(value, rendered):
                ignored.append(name)
            else:
                refused.append(name)
        if refused:
            raise DataError(self._message(row, refused))
        return tuple(ignored)

    def _plan(self, row: Row) -> _Plan:
        names = tuple(row)
        plan = self._plans.get(names)
        if plan is None:
            if len(self._plans) >= MAX_CACHED_PLANS:
                self._plans.clear()
            unused = [name for name in names if name not in self.used]
            flags = [name for name in unused if name in FLAGS and name not in self.left_out]
            inert = [name for name in unused if is_inert(name) and name not in flags]
            others = [name for name in unused if name not in flags and name not in inert]
            not_yet = [
                name for name in others if is_media(snake_case(name)) or _PREFERENCES.fullmatch(snake_case(name))
            ]
            plan = self._plans[names] = _Plan(tuple(inert), tuple(flags), tuple(others), tuple(not_yet))
        return plan

    def _message(self, row: Row, names: list[str]) -> str:
        first = names[0]
        listed = ", ".join(f"'{name}'" for name in names)
        many = len(names) > 1
        advice = next((text for name in names if (text := self._advice(name))), "")
        return (
            f"column{'s' * many} {listed} {'are' if many else 'is'} not used by {self.used_by}, so what "
            f"{'they say' if many else 'it says'} would be left out ('{first}': {row[first]!r:.60}). {advice}"
            f"To train without: `unused_columns: {in_yaml_list(names)}` beside `path`, or `unused_columns: ignore`"
        )

    def _advice(self, name: str) -> str:
        """Return what to write for a column whose meaning is known, ending in a blank; "" for others."""
        snake = snake_case(name)
        if is_media(snake):
            return f"{NOT_YET[0].upper()}{NOT_YET[1:]}. "
        if _PREFERENCES.fullmatch(snake) or (snake == "label" and self.is_chat):
            return "That is preference learning (DPO, KTO), which is not supported yet. "
        if self.is_chat and snake in _SYSTEM:
            return f"A system text: `field_system: {name}`. "
        if self.is_chat and snake in _TOOLS:
            return f"Tools: `field_tools: {name}`. "
        if snake == "history":
            return "Earlier turns: `type: alpaca` reads them. "
        if snake == "messages" or snake == "conversations":
            return f"Messages: `type: chat_template` with `field_messages: {name}`. "
        if _THOUGHTS.fullmatch(snake):
            return "A thought: write it into its message, as `reasoning_content`. "
        if self.is_chat or self.used_by == _TOKENS:
            return ""
        if self.used_by == _BLOCK:
            return f"To put it into the prompt: `field_input: {name}`. "
        return "A `type` block names the columns of a prompt (field_instruction, field_input). "


def columns_of_type(entry: DatasetEntry) -> frozenset[str]:
    """Return the columns that the entry's `type` reads, required or not."""
    form = entry.type
    if isinstance(form, InstructionFormat):
        optional = {name for name in (form.system_column, form.input_column) if name is not None}
        return frozenset({form.field_instruction, form.field_output} | optional)
    more = {
        None: {"attention_mask"},
        "alpaca": {"input", "system", "history"},
        "chat_template": {entry.field_tools, entry.field_system, FUNCTIONS, "chat_template_kwargs"},
        "prompt_completion": {entry.field_tools, entry.field_system, FUNCTIONS, "chat_template_kwargs"},
        "instruction_chat": {"chat_template_kwargs", *filter(None, dict(entry.instruction_columns).values())},
    }
    return frozenset(more.get(form, set())) | set(entry.required_columns)


def _is_written(value: Any, rendered: Rendered | None) -> bool:
    """Whether a cell holds a text that is in the rendered row already, such as the first question of its messages."""
    if rendered is None or not isinstance(value, str):
        return False
    text = value.strip()
    if len(text) >= _MANY_CHARACTERS and text in rendered.text:
        return True
    return any(text == rendered.text[start:stop].strip() for start, stop in rendered.contents)
