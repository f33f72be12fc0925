"""What a row says beside the columns that its `type` reads: inert and counted, or an error that names it.

`inert_names` says which names are inert. A column whose text is in the rendered row already is lost by nobody either.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetuner.data.column_advice import SYSTEM_COLUMNS
from finetuner.data.formats.base import Rendered, beginning_of
from finetuner.data.inert_names import OTHER_THOUGHTS, in_yaml_list, is_empty, is_inert, is_prose, snake_case
from finetuner.data.media import NOT_YET, is_media
from finetuner.data.row_files import Row
from finetuner.data.training_flags import FLAGS, read_flag
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry, InstructionFormat

MAX_CACHED_PLANS = 1024
_TRAINED = re.compile(r"train|learn")
_PREFERENCES = re.compile(r"(chosen|rejected|kto_tag|preferred|dispreferred)(_(messages|response|answer|text))?")
_THOUGHTS = re.compile(r"(reasoning_content|thinking|reasoning|" + OTHER_THOUGHTS + ")")
_TOOLS = frozenset({"tools", "functions", "tool_list", "available_tools", "tool_definitions", "function_list", "apis"})
# Types that make conversations -> the keys that name a column of a system text, and of tools.
_COLUMN_KEYS = {
    "chat_template": ("field_system: {}", "field_tools: {}"),
    "prompt_completion": ("field_system: {}", "field_tools: {}"),
    "instruction_chat": ("instruction_columns: {{system: {}}}", "instruction_columns: {{tools: {}}}"),
}
_TARGETS = frozenset({"target", "targets", "tgt"})
_NAMES_OF_TEXTS = frozenset(
    {"source", "sources", "src", "origin", "title", "topic", "topics", "meta", "metadata", "file"}
)
_MARKS = frozenset({"custom_instruction", "synthetic", "stream", "store"})
_SWITCHES = frozenset({"on", "off", "true", "false", "yes", "no", "low", "medium", "high"})  # of how much is thought
_CHOICES = frozenset({"tool_choice", "function_call"})  # settings of a request, which say something if they name a tool
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
    has_input: bool = False  # a `type` block whose field_input names a column
    key_for_system: str = ""  # what the recipe writes to have a system text or tools read, "{}" for the column
    key_for_tools: str = ""
    _plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: DatasetEntry, used: frozenset[str] | None = None) -> "ColumnCheck":
        """Return the check for an entry. `used`: the columns that are read, if not those of its type."""
        is_chat = entry.type in _COLUMN_KEYS and used is None  # other columns: its rows of texts
        keys = _COLUMN_KEYS[str(entry.type)] if is_chat else ("", "")
        by = _TOKENS if entry.type is None else f"`type: {entry.type}`"
        return cls(
            used=(entry.read_columns if used is None else used) - set(entry.unused_names),
            used_by=_BLOCK if isinstance(entry.type, InstructionFormat) else by,
            left_out=frozenset(entry.unused_names),
            ignores_all=entry.unused_columns == "ignore",
            is_chat=is_chat,
            has_input=isinstance(entry.type, InstructionFormat) and "field_input" in entry.type.model_fields_set,
            key_for_system=keys[0],
            key_for_tools=keys[1],
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
        refused = [
            name
            for name in plan.inert
            if name in _NAMES_OF_TEXTS and is_prose(row[name]) and not self._leaves_out(name)
        ]
        if not plan.suspicious and not refused:
            return plan.inert
        ignored = list(plan.inert)
        for name in plan.suspicious:
            value = row[name]
            if is_empty(value):
                continue
            if self._leaves_out(name) or _is_written(value, rendered) or _is_setting(name, value):
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
            if not _TARGETS.isdisjoint(names):  # a source is then the text that the target was made from
                inert = [name for name in inert if snake_case(name) not in ("source", "src")]
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
        advice = next((text for name in names if (text := self._advice(name, row))), "") or self._prompt_advice(
            row, names
        )
        return (
            f"column{'s' * many} {listed} {'are' if many else 'is'} not used by {self.used_by}, so what "
            f"{'they say' if many else 'it says'} would be left out ('{first}': {beginning_of(row[first])}). {advice}"
            f"To train without: `unused_columns: {in_yaml_list(names)}` beside `path`, or `unused_columns: ignore`"
        )

    def _advice(self, name: str, row: Row) -> str:
        """Return what to write for a column whose meaning is known, ending in a blank; "" for others."""
        snake, cell = snake_case(name), row[name]
        if is_media(snake):
            return f"{NOT_YET[0].upper()}{NOT_YET[1:]}. "
        if _PREFERENCES.fullmatch(snake) or (snake == "label" and self.used_by != _BLOCK and isinstance(cell, bool)):
            return "That is preference learning (DPO, KTO), which is not supported yet. "
        if snake in SYSTEM_COLUMNS and (self.key_for_system or self.used_by == _BLOCK):
            return f"A system text: `{(self.key_for_system or 'field_system: {}').format(name)}`. "
        if self.key_for_tools and snake in _TOOLS:
            return f"Tools: `{self.key_for_tools.format(name)}`. "
        if snake == "history":
            return "Earlier turns: `type: alpaca` reads them. "
        if snake in ("messages", "conversations"):
            return f"Messages: `type: chat_template` with `field_messages: {name}`. "
        if isinstance(cell, bool) and _TRAINED.search(snake):
            return "If it says whether the row is trained on: name it `train`. "
        if _THOUGHTS.fullmatch(snake) and isinstance(cell, str) and cell.lower() not in _SWITCHES:
            if self.is_chat:
                return "A thought: write it into its message, as `reasoning_content`. "
            return "A thought: only messages (`type: chat_template`) have a place for it, as `reasoning_content`. "
        return ""

    def _prompt_advice(self, row: Row, names: list[str]) -> str:
        """Return how one of these columns gets into the prompt, ending in a blank; "" if that takes other rows."""
        texts = [name for name in names if isinstance(row[name], str)]
        if self.is_chat or self.used_by == _TOKENS or not texts:
            return ""
        if self.used_by != _BLOCK:
            return "A `type` block names the columns of a prompt (field_instruction, field_input). "
        return (
            ""
            if self.has_input or not is_empty(row.get("input"))
            else f"To put it into the prompt: `field_input: {texts[0]}`. "
        )


def _is_setting(name: str, value: Any) -> bool:
    """Whether a cell is a setting or a mark that holds no text of its own: tool_choice "auto", deleted false."""
    return (name in _CHOICES and value in ("auto", "none")) or (name in _MARKS and isinstance(value, bool))


def _is_written(value: Any, rendered: Rendered | None) -> bool:
    """Whether a cell holds a text that is in the rendered row already, such as the first question of its messages."""
    if rendered is None or not isinstance(value, str):
        return False
    text = value.strip()
    if len(text) >= _MANY_CHARACTERS and text in rendered.text:
        return True
    return any(text == rendered.text[start:stop].strip() for start, stop in rendered.contents)
