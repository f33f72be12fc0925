"""What a row says beside the columns that its `type` reads: inert and counted, or an error that names it.

A name is inert if nothing that a model could learn from is lost without it: an id, a date, a source, a count. Any other
column that holds something may be a part of what its author trained on.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetuner.data.formats.base import Rendered
from finetuner.data.media import NOT_YET, is_media
from finetuner.data.messages import FUNCTIONS
from finetuner.data.row_files import Row
from finetuner.data.training_flags import FLAGS, read_flag
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry, InstructionFormat

MAX_CACHED_PLANS = 1024
# In snake case: createdAt is created_at.
INERT = frozenset({
    "", "id", "idx", "index", "uuid", "guid", "uid", "qid", "pid", "key", "row", "hash", "sha", "hexsha", "md5",
    "timestamp", "timestamps", "time", "date", "datetime", "year", "created", "updated", "modified", "meta", "metadata",
    "source", "sources", "src", "origin", "provenance", "dataset", "subset", "config", "split", "corpus", "dump", "url",
    "urls", "uri", "link", "path", "file", "filename", "ext", "title", "author", "authors", "username", "license",
    "licence", "language", "lang", "languages", "locale", "country", "category", "categories", "subcategory", "topic",
    "topics", "subtopic", "tag", "tags", "keywords", "domain", "genre", "type", "level", "difficulty", "grade",
    "rating", "score", "scores", "quality", "views", "stars", "likes", "votes", "upvotes", "downvotes", "model",
    "generator", "engine", "annotator", "annotators", "version", "revision", "commit", "fold", "shard", "token_count",
    "tokens_count", "length", "len", "size", "turn", "turns", "perplexity", "ppl", "toxicity", "toxic", "redacted",
    "moderation", "hashed_ip", "finish_reason", "finish_reasons", "usage", "latency", "parallel_tool_calls",
    "token_type_ids", "special_tokens_mask", "skip_prompt_formatting", "used_in_training", "file_extension",
})  # fmt: skip
_INERT_ENDING = re.compile(
    r"(.*_(id|uuid|guid|hash|sha|sha1|sha256|md5|url|uri|at|date|time|timestamp|source|language|lang|license|score|"
    r"rating|idx|index|split|version|count|name|path|metadata|meta|category|type|moderation|model)|(num|n|nr)_.*|"
    r"unnamed: ?\d+|__index_level_\d+__)\Z"
)
# Endings that would make these inert, which say what is trained on.
_NOT_INERT = frozenset({"function_name", "tool_name", "character_name", "user_name", "assistant_name", "bot_name"})
_PREFERENCES = re.compile(r"(chosen|rejected|kto_tag|preferred|dispreferred)(_(messages|response|answer|text))?")
_SYSTEM = frozenset({"system", "system_prompt", "system_message", "system_text", "system_instruction", "sys_prompt"})
_TOOLS = frozenset({"tools", "functions", "tool_list", "available_tools", "tool_definitions", "function_list", "apis"})
_MANY_CHARACTERS = 24  # a text as long as this does not stand in another one by chance


def snake_case(name: str) -> str:
    """Return the name in lower case with underscores: createdAt becomes created_at."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower() if name else name


def is_inert(name: str) -> bool:
    """Whether a column or key of this name holds nothing that a model would learn from."""
    snake = snake_case(name)
    if snake in _NOT_INERT or is_media(snake):
        return False
    return snake in INERT or _INERT_ENDING.match(snake) is not None or name.startswith("Unnamed:")


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, "", [] or {}, or one that holds only such."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, Mapping):
        return all(is_empty(inner) for inner in value.values())
    return isinstance(value, list | tuple) and all(is_empty(inner) for inner in value)


def in_yaml_list(names: list[str]) -> str:
    """Return names as a YAML list, quoted where YAML asks for it."""
    return "[" + ", ".join(name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else json.dumps(name) for name in names) + "]"


class _Plan(NamedTuple):
    """The columns of rows with certain columns: inert ones, flags, and those whose cell has to be looked at."""

    inert: tuple[str, ...]
    flags: tuple[str, ...]
    suspicious: tuple[str, ...]


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
        by = "rows of tokens" if entry.type is None else f"`type: {entry.type}`"
        return cls(
            used=(columns_of_type(entry) if used is None else used) - set(entry.unused_names),
            used_by="the `type` block" if isinstance(entry.type, InstructionFormat) else by,
            left_out=frozenset(entry.unused_names),
            ignores_all=entry.unused_columns == "ignore",
            is_chat=entry.type in ("chat_template", "prompt_completion"),
        )

    def is_trained(self, row: Row) -> bool:
        """Return whether the row is trained on, as far as a column of it says so; see `training_flags`."""
        flags = self._plan(row).flags
        return not flags or read_flag(flags, row, "the row") is not False

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
            if self.ignores_all or name in self.left_out or _is_written(value, rendered):
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
            plan = self._plans[names] = _Plan(tuple(inert), tuple(flags), tuple(others))
        return plan

    def _message(self, row: Row, names: list[str]) -> str:
        first = names[0]
        listed = ", ".join(f"'{name}'" for name in names)
        many = len(names) > 1
        advice = next((text for name in names if (text := self._advice(name, row[name]))), "")
        return (
            f"column{'s' * many} {listed} {'are' if many else 'is'} not used by {self.used_by}, so what "
            f"{'they say' if many else 'it says'} would be left out ('{first}': {row[first]!r:.60}). {advice}"
            f"To train without: `unused_columns: {in_yaml_list(names)}` beside `path`, or `unused_columns: ignore`"
        )

    def _advice(self, name: str, value: Any) -> str:
        """Return what to write for a column whose meaning is known, ending in a blank; "" for others."""
        snake = snake_case(name)
        if is_media(snake):
            return f"{NOT_YET[0].upper()}{NOT_YET[1:]}. "
        if _PREFERENCES.fullmatch(snake) or (snake == "label" and isinstance(value, bool)):
            return "That is preference learning (DPO, KTO), which is not supported yet. "
        if self.is_chat and snake in _SYSTEM:
            return f"A system text: `field_system: {name}`. "
        if self.is_chat and snake in _TOOLS:
            return f"Tools: `field_tools: {name}`. "
        if snake == "history":
            return "Earlier turns: `type: alpaca` reads them. "
        if snake == "messages" or snake == "conversations":
            return f"Messages: `type: chat_template` with `field_messages: {name}`. "
        return "" if self.is_chat else "A `type` block names the columns of a text (field_instruction, field_input). "


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
