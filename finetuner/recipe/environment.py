"""Fills in `${env:NAME}` in a recipe's values, and refuses what looks like a variable and would stay as it is.

A folder named `${SCRATCH}` is never what somebody meant. Texts that a model reads (templates, prompts, tokens) may hold
such words, and keep them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from finetuner.recipe.foreign.translate import ALIASES
from finetuner.recipe.problems import KeyPath, Problem
from finetuner.recipe.schema import KEYS
from finetuner.recipe.yaml_document import YamlDocument, parse_value
from finetuner.redaction import without_secrets
from finetuner.world import environment_value

# Texts for a model or a template, in which `${...}` is as good as any other word; and patterns, where `$` is an end.
FREE_TEXT = frozenset((
    "chat_template", "chat_template_jinja", "chat_template_kwargs", "eot_tokens", "format", "generate_prompt",
    "no_input_format", "special_tokens", "system_format", "system_prompt", "tokens",
    "lora_target_modules", "lora_modules_to_save", "peft_layers_pattern", "unfrozen_parameters", "modules",
))  # fmt: skip
READ_FROM = frozenset(("path", "data_files", "files"))  # a file of such a name may be there

_FILLED = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_BRACED = re.compile(r"\$\{([^{}]*)\}?|\$\(([^()]*)\)?")
_BARE = re.compile(r"(?:^|(?<=[/\\:]))(?:\$(?:env:)?([A-Za-z_]\w*)|%(?![0-9A-Fa-f]{2}%)([A-Za-z_]\w*)%)")
_SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials"}

ReadVariable = Callable[[str], str | None]


def fill_in_environment(document: YamlDocument, read: ReadVariable = environment_value) -> None:
    """Write the environment's values into the document's, in place; what cannot be filled in joins its problems."""
    document.values = _Filling(document, read).block(document.values, ())


def refuse_variables(document: YamlDocument) -> None:
    """Let what fill_in_environment would refuse join the document's problems, and leave `${env:NAME}` as it is."""
    _Filling(document, None).block(document.values, ())


class _Filling:
    def __init__(self, document: YamlDocument, read: ReadVariable | None) -> None:
        self.document, self.read = document, read

    def value(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return self.block(value, path)
        if isinstance(value, list):
            return [self.value(inner, (*path, i)) for i, inner in enumerate(value)]
        return self.text(value, path) if isinstance(value, str) and ("$" in value or "%" in value) else value

    def block(self, values: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        return {key: self.value(value, (*path, key)) for key, value in values.items()}

    def text(self, text: str, path: KeyPath) -> Any:
        """The text with the environment's values in it; or the number, list or block that it is all of."""
        is_free = any(part in FREE_TEXT for part in path)
        if not is_free:
            other = _other_variable(_FILLED.sub("", text), path)
            if other is not None:
                self.problem(other, path)
                return text
        names = _FILLED.findall(text)
        if not names or self.read is None:
            return text
        found = {name: self.read(name) for name in names}
        missing = [name for name, value in found.items() if not value]
        if missing:
            state = "empty" if found[missing[0]] == "" else "not set"
            self.problem(f"the environment variable {missing[0]} is {state}. Set it: export {missing[0]}=...", path)
            return text
        filled = _FILLED.sub(lambda match: found[match[1]] or "", text)
        problem = _told_secret(found, filled) or (None if is_free else _other_variable(filled, path))
        if problem is not None:
            self.problem(problem, path)
            return text
        if _FILLED.fullmatch(text) and "#" not in filled and not _takes_text(path):
            try:
                return parse_value(filled)
            except ValueError:
                return filled
        return filled

    def problem(self, message: str, path: KeyPath) -> None:
        self.document.problems.append(Problem(message, self.document.origin(path)))


def _other_variable(text: str, path: KeyPath) -> str | None:
    """Return the error for the first variable in a text that is not `${env:NAME}`; None if there is none."""
    key = ".".join(map(str, path))
    braced = _BRACED.search(text)
    if braced is not None:
        inner = re.fullmatch(r"(?:oc\.)?(?:env[:.])?([A-Za-z_]\w*)(?:[:,].*)?", braced[1] or "")
        name = inner[1] if inner else "NAME"
        return (
            f"{key}: '{braced[0]}' would stay as it is written. A variable of the environment is written "
            f"${{env:{name}}}, without a default, and nothing else is filled in."
        )
    bare = _BARE.search(text)
    if bare is None or (READ_FROM & set(path) and Path(text).exists()):
        return None
    return (
        f"{key}: '{bare[0]}' would stay as it is written. A variable of the environment is written "
        f"${{env:{bare[1] or bare[2]}}}."
    )


def _told_secret(found: dict[str, str | None], filled: str) -> str | None:
    """Why a value may not be filled in that a run would write down, if it is a secret by its name."""
    for name, value in found.items():
        if _SECRET_WORDS & set(name.lower().split("_")) and value and value in without_secrets(filled):
            return (
                f"{name} is a secret by its name, and a run saves its recipe beside the result. Remove it here: "
                "libraries read their tokens from the environment themselves."
            )
    return None


def _takes_text(path: KeyPath) -> bool:
    """Whether the place takes any text, so that a value which looks like a number stays text."""
    key = ALIASES.get(str(path[0]), str(path[0]))
    annotation: Any = KEYS[key][1].annotation if key in KEYS else None
    for part in path[1:]:
        annotation = _inside(annotation, part)
    return str in _members(annotation)


def _inside(annotation: Any, part: str | int) -> Any:
    """The type of an entry of a list, or of a key of a block; None where it is not known."""
    for member in _members(annotation):
        if isinstance(part, int) and get_origin(member) in (tuple, list):
            return get_args(member)[0]
        if isinstance(part, str) and isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                return member.model_fields[part].annotation
        elif isinstance(part, str) and get_origin(member) is dict:
            return get_args(member)[1]
    return None


def _members(annotation: Any) -> list[Any]:
    """The types of a union, without what annotates them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [annotation]
