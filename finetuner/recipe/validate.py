"""Validates a document's values as sections, and turns pydantic's errors into one problem for each place."""

import math
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetuner.recipe.foreign.tools import ELSEWHERE
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.problems import KeyPath, Problem, did_you_mean, did_you_mean_one_of, edit_distance, near_words
from finetuner.recipe.schema import KEYS, SECTIONS, Recipe
from finetuner.recipe.sections import Section
from finetuner.recipe.yaml_document import YamlDocument


def validate(document: YamlDocument) -> tuple[dict[str, Any], Recipe | None]:
    """Validate section by section; return all keys that are valid, and the Recipe if every one is."""
    given = _by_section(document)
    # "learning_rat" is one mistake, not also a missing learning_rate
    meant = {near for key in document.values if key not in KEYS for near in near_words(key, KEYS)}
    values: dict[str, Any] = {}
    sections: dict[str, Section] = {}
    for name, section_type in SECTIONS.items():
        try:
            section = section_type.model_validate(given[name])
        except ValidationError as error:
            wrong = {str(details["loc"][0]) for details in error.errors()}
            document.problems += _problems_of(error, section_type, document, meant)
            rest = {key: value for key, value in given[name].items() if key not in wrong}
            values |= _valid_values(section_type, rest, wrong)
        else:
            sections[name] = section
            values |= dict(section)
    complete = len(sections) == len(SECTIONS)
    return values, Recipe.model_validate(sections) if complete else None


def _by_section(document: YamlDocument) -> dict[str, dict[str, Any]]:
    """section -> its keys that are given; an unknown key joins the document's problems."""
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in document.values.items():
        if key not in KEYS:
            document.problems.append(Problem(_unknown_key(key), document.origin((key,), of_key=True)))
        elif value is not None:  # `key:` with nothing after it means the default, as in other tools
            given[KEYS[key][0]][key] = value
    return given


# Stands in for a required key that is missing or wrong, so that the other keys of its section can still be checked.
_STAND_IN: dict[str, Any] = {"base_model": "?", "datasets": [{"path": "?", "type": "alpaca"}], "learning_rate": 1.0}


def _valid_values(section_type: type[Section], rest: dict[str, Any], wrong: set[str]) -> dict[str, Any]:
    """Validated values of the keys that are right, so that the rules can still speak about them."""
    stand_in = {key: value for key, value in _STAND_IN.items() if key in wrong and key in section_type.model_fields}
    section = section_type.model_validate({**rest, **stand_in})
    return {key: value for key, value in section if key not in wrong}


def _unknown_key(key: str) -> str:
    if key in ELSEWHERE:
        return f"unknown key '{key}'. It is called {ELSEWHERE[key]} here."
    # A key that only Axolotl has is meant only if it is very near: most of those do nothing here.
    theirs = [word for word in MEANINGS if edit_distance(key, word, limit=max(1, len(key) // 6)) is not None]
    near = near_words(key, [*KEYS, *theirs])
    ours = [word for word in near if word in KEYS]
    return f"unknown key '{key}'.{did_you_mean_one_of(ours or near)}"


def _problems_of(
    error: ValidationError, section_type: type[Section], document: YamlDocument, meant: set[str]
) -> list[Problem]:
    """One problem for each place; of a union, which reports each of its members, the most telling.

    Keys that an unknown key was `meant` to be are not missing as well.
    """
    by_place: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_place.setdefault(_place(details["loc"], document.values), []).append(details)
    problems = []
    for path, group in by_place.items():
        if group[0]["type"] == "too_short" and any(p[: len(path)] == path and p != path for p in by_place):
            continue  # pydantic does not count the entries that are wrong
        if group[0]["type"] == "missing" and len(path) == 1 and path[0] in meant:
            continue
        unknown = group[0]["type"] == "extra_forbidden"
        message = _describe(path, group, section_type)
        problems.append(Problem(message, document.origin(path, of_key=unknown)))
    return problems


def _place(loc: tuple[int | str, ...], values: Any) -> KeyPath:
    """The recipe's path of a location of pydantic's, which also names members of unions ("tuple[str, ...]")."""
    path: list[int | str] = [loc[0]]
    value = values.get(loc[0]) if isinstance(values, dict) else None
    for i, part in enumerate(loc[1:], 1):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            value = value[part]
        elif isinstance(part, str) and isinstance(value, dict) and (part in value or i == len(loc) - 1):
            value = value.get(part)
        else:
            continue
        path.append(part)
    return tuple(path)


def _describe(path: KeyPath, group: list[ErrorDetails], section_type: type[Section]) -> str:
    name = ".".join(str(part) for part in path)
    details, given = group[0], group[0]["input"]
    context = details.get("ctx", {})
    kind = details["type"]
    if kind == "missing":
        return f"'{name}' is missing. {_meaning(path, section_type)}"
    if kind == "extra_forbidden":
        return f"unknown key '{name}'.{did_you_mean(str(path[-1]), _fields_at(path[:-1], section_type))}"
    if kind in ("too_short", "string_too_short"):
        return f"{name} is empty. {_meaning(path, section_type)}"
    shown = f"{name} is {_show(given)}, but must be"
    if len(group) == 1 and kind == "literal_error":
        choices = [c.strip("'") for c in str(context["expected"]).replace(" or ", ", ").split(", ")]
        hint = did_you_mean(given, choices) if isinstance(given, str) else ""
        return f"{shown} one of: {', '.join(choices)}.{hint}"
    if kind in _BOUNDS:
        return f"{shown} {_BOUNDS[kind]} {context[_BOUND_KEY[kind]]}."
    return f"{shown} {_wanted(group)}.{_without_quotes(given, kind)}"


def _wanted(group: list[ErrorDetails]) -> str:
    """The types that a place takes, in words."""
    wanted = " or ".join(dict.fromkeys(_WANTED.get(details["type"], details["msg"]) for details in group))
    if "literal_error" in {details["type"] for details in group}:
        wanted = wanted.replace(_WANTED["literal_error"], str(group[0]["ctx"]["expected"]).strip("'"))
    return wanted


def _without_quotes(given: Any, kind: str) -> str:
    """A hint for a number that was written as text."""
    if not isinstance(given, str) or kind not in ("int_type", "float_type"):
        return ""
    return f" Write {given} without quotes." if _is_number(given, int if kind == "int_type" else float) else ""


_BOUNDS = {
    "greater_than_equal": "at least",
    "greater_than": "more than",
    "less_than_equal": "at most",
    "less_than": "less than",
}
_BOUND_KEY = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list (lines that begin with `- `)",
    "model_type": "a block of `key: value` lines",
    "literal_error": "one of the names",
    "none_required": "left empty",
}


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "empty"
    if isinstance(value, str):
        return f"the text '{value[:60]}'"
    if isinstance(value, dict | list):
        return "a block of keys" if isinstance(value, dict) else "a list"
    return str(value)


def _is_number(text: str, kind: type[int | float]) -> bool:
    try:
        return math.isfinite(kind(text))
    except (ValueError, OverflowError):
        return False


def _meaning(path: KeyPath, section_type: type[Section]) -> str:
    fields = _model_at(path[:-1], section_type).model_fields
    return fields[str(path[-1])].description or "" if str(path[-1]) in fields else ""


def _fields_at(path: KeyPath, section_type: type[Section]) -> list[str]:
    return list(_model_at(path, section_type).model_fields)


def _model_at(path: KeyPath, model: type[BaseModel]) -> type[BaseModel]:
    """The nested model that the block at `path` is validated by."""
    for part in path:
        if isinstance(part, int):
            continue
        found = _nested_model(model.model_fields[part].annotation)
        if found is None:
            break
        model = found
    return model


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _nested_model(argument)
        if found is not None:
            return found
    return None
