"""File and overrides -> Recipe, with every mistake reported at once."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetuner.errors import RecipeError
from finetuner.recipe.document import MAX_RECIPE_BYTES, Document, parse_value, parse_yaml
from finetuner.recipe.foreign.translate import MEANINGS, translate
from finetuner.recipe.problems import (
    KeyPath,
    Note,
    Origin,
    Problem,
    did_you_mean,
    meant,
    near_words,
    once,
    render_problems,
)
from finetuner.recipe.rules import file_findings, given_findings, rule_findings
from finetuner.recipe.schema import KEYS, SECTIONS, Recipe
from finetuner.recipe.sections import Section


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, and what the user should know about how it was read."""

    recipe: Recipe
    notes: tuple[Note, ...] = ()


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe and apply `key=value` overrides. Raises RecipeError that lists every mistake."""
    return load(path, overrides, check_files=check_files).recipe


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = (), *, check_files: bool = True) -> Loaded:
    """As load_recipe, with the notes. `check_files=False` leaves out whether named files exist."""
    document = parse_yaml(_read(Path(path)), str(path))
    for number, override in enumerate(overrides, 1):
        _apply_override(document, number, override)
    if not document.is_whole:
        raise RecipeError(render_problems(str(path), document.problems))
    notes = translate(document)
    values, recipe = _validate(document)
    findings = [*rule_findings(values), *given_findings(document.values)]
    findings += file_findings(document.values) if check_files else ()
    document.problems += [
        Problem(f.message, document.origin(f.where), tuple(filter(None, map(document.origin, f.also))))
        for f in findings
    ]
    if document.problems or recipe is None:
        raise RecipeError(render_problems(str(path), document.problems))
    return Loaded(recipe, once(notes))


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise RecipeError(f"'{path}' is a folder; name the recipe's YAML file in it.")
        if not path.exists():
            near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            listed = f" Recipes in {path.parent}: {', '.join(near)}." if near else ""
            raise RecipeError(
                f"there is no recipe '{path}' (seen from {Path.cwd()}).{did_you_mean(path.name, near)}{listed}"
            )
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise RecipeError(f"'{path}' has {size:,} bytes; a recipe may have {MAX_RECIPE_BYTES:,}. Is it a recipe?")
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"'{path}' cannot be read as UTF-8 text: {error}") from error


_INDEX = re.compile("[0-9]{1,6}")


def _apply_override(document: Document, number: int, override: str) -> None:
    key, equals, text = override.partition("=")
    origin = Origin(f"override {number}", text=override)
    if not equals or not key.strip():
        document.problems.append(Problem("an override is written key=value, such as learning_rate=1e-4.", origin))
        return
    try:
        value = parse_value(text)
    except ValueError as error:
        document.problems.append(Problem(f"the value is not YAML: {error}", origin))
        return
    path: KeyPath = tuple(int(part) if _INDEX.fullmatch(part) else part for part in key.strip().split("."))
    target: Any = document.values
    for step, following in pairwise(path):
        if isinstance(target, dict) and isinstance(step, str):
            if target.get(step) is None:
                target[step] = [] if isinstance(following, int) else {}
            target = target[step]
        elif isinstance(target, list) and isinstance(step, int) and step < len(target):
            target = target[step]
        else:
            target = None
            break
    last = path[-1]
    if isinstance(target, dict) and isinstance(last, str):
        target[last] = value
    elif isinstance(target, list) and isinstance(last, int) and last <= len(target):
        target[last:] = [value, *target[last + 1 :]]
    else:
        document.problems.append(Problem(f"the recipe has no place '{key}' to write to.", origin))
        return
    for end in range(1, len(path) + 1):
        document.keys.setdefault(path[:end], origin)
        document.places.setdefault(path[:end], origin)
    document.keys[path] = document.places[path] = origin
    for table in (document.keys, document.places):  # what stood below the overridden place is gone
        for stale in [k for k in table if len(k) > len(path) and k[: len(path)] == path]:
            del table[stale]


def _validate(document: Document) -> tuple[dict[str, Any], Recipe | None]:
    """Validate section by section; returns all keys that are valid, and the Recipe if every one is."""
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in document.values.items():
        if key in KEYS:
            if value is not None:  # `key:` with nothing behind it means the default, as in other tools
                given[KEYS[key][0]][key] = value
        else:
            where = document.origin((key,), of_key=True)
            document.problems.append(Problem(_unknown_key(key), where))
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
            values |= _valid_part(section_type, rest, wrong)
        else:
            sections[name] = section
            values |= {key: getattr(section, key) for key in section_type.model_fields}
    complete = len(sections) == len(SECTIONS)
    return values, Recipe.model_validate(sections) if complete else None


# Stands in for a required key that is missing or wrong, so that the keys beside it can still be checked.
_STAND_IN: dict[str, Any] = {"base_model": "?", "datasets": [{"path": "?", "type": "alpaca"}], "learning_rate": 1.0}


def _valid_part(section_type: type[Section], rest: dict[str, Any], wrong: set[str]) -> dict[str, Any]:
    """Validated values of the keys that are right, so that the rules can still speak about them."""
    stand_in = {key: value for key, value in _STAND_IN.items() if key in wrong and key in section_type.model_fields}
    section = section_type.model_validate({**rest, **stand_in})
    return {key: getattr(section, key) for key in section_type.model_fields if key not in wrong}


def _unknown_key(key: str) -> str:
    near = near_words(key, [*KEYS, *MEANINGS])
    ours = [word for word in near if word in KEYS]
    return f"unknown key '{key}'.{meant(ours or near)}"


def _problems_of(
    error: ValidationError, section_type: type[Section], document: Document, meant: set[str]
) -> list[Problem]:
    """One problem per place; a union reports each of its members, of which the most telling is kept.

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
    """The part of pydantic's location that is in the recipe: it also names members of unions ("tuple[str, ...]")."""
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
    shown = f"{name} is {_show(given)}"
    if len(group) == 1 and kind == "literal_error":
        choices = [c.strip("'") for c in str(context["expected"]).replace(" or ", ", ").split(", ")]
        hint = did_you_mean(given, choices) if isinstance(given, str) else ""
        return f"{shown}, but must be one of: {', '.join(choices)}.{hint}"
    if kind in _BOUNDS:
        return f"{shown}, but must be {_BOUNDS[kind]} {context[_BOUND_KEY[kind]]}."
    if kind in ("too_short", "string_too_short"):
        return f"{name} is empty. {_meaning(path, section_type)}"
    wanted = " or ".join(dict.fromkeys(_WANTED.get(d["type"], d["msg"]) for d in group))
    if "literal_error" in {d["type"] for d in group}:
        wanted = wanted.replace(_WANTED["literal_error"], str(group[0]["ctx"]["expected"]).strip("'"))
    hint = ""
    if isinstance(given, str) and kind in ("int_type", "float_type"):
        hint = f" Write {given} without quotes." if _is_number(given, int if kind == "int_type" else float) else ""
    return f"{shown}, but must be {wanted}.{hint}"


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
