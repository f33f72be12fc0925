"""Explains keys: to a person (`finetuner explain`), to an editor (`finetuner schema`), and as docs/recipe.md."""

import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from finetuner.errors import RecipeError
from finetuner.recipe.foreign.base import Foreign
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.load import Loaded
from finetuner.recipe.problems import did_you_mean_one_of, near_words
from finetuner.recipe.schema import FACTS, KEYS, SECTIONS
from finetuner.recipe.sections.base import unit_of
from finetuner.redaction import without_secrets


def explain(key: str, loaded: Loaded | None = None) -> str:
    """Return meaning, type and default of a key, and for a recipe where it was set and what it came to.

    Dotted names reach into blocks: `special_tokens.pad_token`, `datasets.type`. Raises RecipeError for no key.
    """
    if key in MEANINGS and key not in KEYS:
        return f"{key}\n  {foreign_meaning(MEANINGS[key])}"
    name, _, rest = key.partition(".")
    if name not in KEYS:
        raise RecipeError(f"there is no key '{key}'.{did_you_mean_one_of(near_words(name, [*KEYS, *MEANINGS]))}")
    section, info = KEYS[name]
    info = _inner(info, name, [part for part in rest.split(".") if part and not part.isdigit()])
    lines = [key, f"  {info.description}", f"  type      {type_of(info)}", f"  default   {default_of(info)}"]
    if not rest:
        lines.append(f"  section   {section}: {SECTIONS[section].__doc__}")
        lines.append(f"  Axolotl   {FACTS[name].axolotl}")
    lines += _block_lines(info)
    if loaded is not None and not rest:
        value = dict(dict(loaded.recipe)[section])[name]
        origin = loaded.origins.get(name)
        lines.append(f"  here      {_plain(value)}, set at {origin}" if origin else "  here      not set: the default")
    return "\n".join(lines)


def _block_lines(info: FieldInfo) -> list[str]:
    """The keys of the block that a key holds, a line each."""
    nested = nested_model(info)
    if nested is None:
        return []
    width = max(map(len, nested.model_fields))
    keys = [f"    {field:<{width}}  {inner.description}" for field, inner in nested.model_fields.items()]
    return ["  its keys", *keys]


def _inner(info: FieldInfo, name: str, path: list[str]) -> FieldInfo:
    for part in path:
        model = nested_model(info)
        if model is None or part not in model.model_fields:
            known = list(model.model_fields) if model is not None else []
            raise RecipeError(f"'{name}' has no key '{part}'.{did_you_mean_one_of(near_words(part, known))}")
        info, name = model.model_fields[part], f"{name}.{part}"
    return info


def nested_model(info: FieldInfo) -> type[BaseModel] | None:
    """Return the block that is a key's value, or an entry of its list."""
    waiting: list[Any] = [info.annotation]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        waiting += get_args(annotation)
    return None


def type_of(info: FieldInfo) -> str:
    """Return the values that a key takes, in words, with bounds and unit."""
    unit = unit_of(info)
    bounds = _bounds([*info.metadata, *_metadata(info.annotation)])
    return " ".join(part for part in (_words(info.annotation), bounds, f"({unit})" if unit else "") if part)


_PLAIN_TYPES: dict[type, str] = {
    int: "whole number", float: "number", bool: "true | false", str: "text", dict: "a block", type(None): "",
}  # fmt: skip


def _words(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(_plain(value) for value in arguments)
    if origin is tuple:
        return f"a list of {_words(arguments[0])}"
    if origin is dict:
        return f"a block of {_words(arguments[1])}"
    if isinstance(annotation, type):
        return _PLAIN_TYPES.get(annotation, "a block")
    members = [member for member in arguments if member is not type(None) and not _is_metadata(member)]
    return " | ".join(dict.fromkeys(filter(None, map(_words, members)))) or "anything"


def _is_metadata(part: Any) -> bool:
    return get_origin(part) is None and not isinstance(part, type)


def _metadata(annotation: Any) -> list[Any]:
    found = list(getattr(annotation, "__metadata__", ()))
    for part in get_args(annotation):
        found += _metadata(part)
    return found


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _bounds(metadata: list[Any]) -> str:
    parts = [*metadata, *(inner for part in metadata for inner in getattr(part, "metadata", ()))]
    said = [
        f"{sign} {bound:g}"
        for name, sign in _SIGNS.items()
        for bound in [next((getattr(part, name) for part in parts if getattr(part, name, None) is not None), None)]
        if bound is not None
    ]
    return ", ".join(said)


def default_of(info: FieldInfo) -> str:
    """Return the default of a key as it would be written in YAML."""
    if info.is_required():
        return "none: it must be given"
    value = info.get_default(call_default_factory=False)
    return "not set" if value is None or value is PydanticUndefined else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, tuple):
        value = [v.model_dump(mode="json", exclude_none=True) if isinstance(v, BaseModel) else v for v in value]
    if value in ({}, []):
        return "empty"
    value = without_secrets(value)
    return value if isinstance(value, str) else json.dumps(value)


def foreign_meaning(meaning: Foreign) -> str:
    """Return one line on a key that is another tool's."""
    if meaning.becomes is not None:
        return f"another name of {meaning.becomes}"
    if meaning.without_effect is not None:
        return f"accepted, without effect: {meaning.without_effect}"
    if meaning.unsupported is not None:
        return f"not supported yet: {meaning.unsupported}. {meaning.instead}"
    assert meaning.translate is not None
    made = ", ".join(f"{key}: {_plain(value)}" for key, value in meaning.translate(True).items())
    return f"read as {made}" if made else "left out"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, in which an empty key means its default."""
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    required: list[str] = []
    for section in SECTIONS.values():
        schema = section.model_json_schema(ref_template="#/$defs/{model}", mode="validation")
        definitions |= schema.pop("$defs", {})
        required += schema.get("required", [])
        for key, described in schema["properties"].items():
            described.pop("title", None)
            optional = key not in schema.get("required", [])
            properties[key] = _or_empty(described) if optional else described
    blocks = definitions["FsdpConfig"]["properties"]
    for words in (*blocks.values(), properties["fsdp"]):  # read from one text too, and in either case
        words["anyOf"] = [*(words.pop("anyOf", None) or [_kind(words)]), {"type": "string"}]
    definitions["FsdpConfig"]["properties"] = blocks | {f"fsdp_{key}": words for key, words in blocks.items()}
    for key, meaning in MEANINGS.items():
        properties[key] = {"description": foreign_meaning(meaning), "deprecated": True}
    properties["plugins"] = {"description": "Axolotl's plugins; Liger and cut cross entropy alone.", "deprecated": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "finetuner recipe",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _kind(schema: dict[str, Any]) -> dict[str, Any]:
    """Move the type out of a schema, whose description stays."""
    return {key: schema.pop(key) for key in list(schema) if key not in ("description", "default", "title")}


def _or_empty(schema: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {key: schema.pop(key) for key in ("description", "default") if key in schema}
    choices = schema.pop("anyOf", None) or [schema]
    return {**described, "anyOf": choices if {"type": "null"} in choices else [*choices, {"type": "null"}]}


def reference() -> str:
    """Return the text of docs/recipe.md."""
    lines = [
        "# The recipe",
        "",
        "Every key a recipe may have, by section. In YAML all keys are flat. This page is made by",
        "`finetuner schema --markdown` and a test compares it; `finetuner explain KEY [RECIPE]` says the same of",
        "one key, and what it came to in a recipe. A key with nothing after it means its default. YAML 1.2: `2e-5`",
        "is a number, `no` is text.",
        "",
    ]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", "", (section.__doc__ or "").strip(), ""]
        lines += _table(section)
        for key, info in section.model_fields.items():
            nested = nested_model(info)
            if nested is not None:
                lines += [f"### {key}", "", (nested.__doc__ or "").strip(), "", *_table(nested, axolotl=False)]
    lines += ["## Keys of other tools", "", "| key | here |", "|---|---|"]
    lines += [f"| `{key}` | {_cell(foreign_meaning(meaning))} |" for key, meaning in sorted(MEANINGS.items())]
    lines += ["| `plugins` | Liger and cut cross entropy: accepted, without effect; any other: not supported |"]
    return "\n".join(lines) + "\n"


def _table(section: type[BaseModel], *, axolotl: bool = True) -> list[str]:
    head = ["| key | type | default | meaning |" + (" in Axolotl |" if axolotl else "")]
    rows = [head[0], "|---" * (5 if axolotl else 4) + "|"]
    for key, info in section.model_fields.items():
        cells = [f"`{key}`", _cell(type_of(info)), _cell(default_of(info)), _cell(info.description or "")]
        rows.append("| " + " | ".join([*cells, FACTS[key].axolotl] if axolotl else cells) + " |")
    return [*rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
