"""Converts a recipe of Axolotl, LLaMA-Factory or TRL into one of ours, with a comment where something changed."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from finetuner.errors import RecipeError
from finetuner.recipe.environment import refuse_variables
from finetuner.recipe.foreign.rewriting import FirstRow, Rewriting, no_rows
from finetuner.recipe.foreign.tools import AXOLOTL_TOOL, Tool, tool_of
from finetuner.recipe.foreign.translate import translate
from finetuner.recipe.fsdp_prefix import drop_fsdp_prefix
from finetuner.recipe.load import load, read_text, resolve
from finetuner.recipe.problems import Note, render_problems
from finetuner.recipe.schema import FACTS
from finetuner.recipe.yaml_document import YamlDocument, parse_yaml

_WITH_OTHERS = "is read with other keys, or says what holds anyway"
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"  # finetuner schema > recipe.schema.json


@dataclass(frozen=True)
class Converted:
    """Our recipe as text, and a note on each key that changed."""

    tool: str
    text: str
    notes: tuple[Note, ...]


def convert(path: str | Path, *, first_row: FirstRow = no_rows) -> Converted:
    """Return our recipe for the one at `path`. Raises RecipeError with every key that blocks.

    `first_row`: looks at a dataset where the tool tells the kind of rows from their columns.
    """
    document = parse_yaml(read_text(Path(path)), str(path))
    if not document.is_complete:
        raise RecipeError(render_problems(str(path), document.problems))
    refuse_variables(document)
    drop_fsdp_prefix(document)
    tool = tool_of(document.values)
    given = list(document.values)
    rewriting = Rewriting(document, first_row)
    tool.rewrite(rewriting)
    notes = rewriting.notes + translate(document, tool.meanings)
    _join_adapter_keys(document.values)
    silence = {**tool.defaults, **rewriting.defaults}
    with_adapter = {"adapter": silence.get("adapter"), **document.values}
    unsaid = {key: value for key, value in silence.items() if document.values.get(key) is None}
    defaults = {key: value for key, value in unsaid.items() if _counts(key, with_adapter)}
    document.values |= defaults
    loaded = resolve(document, notes, check_files=False)
    text = _written(document, Path(path).name, tool, given, notes, defaults, rewriting.remarks)
    return Converted(tool.name, text, loaded.notes)


def check_lines(path: str, overrides: list[str], *, verbose: bool, first_row: FirstRow = no_rows) -> Iterator[str]:
    """Yield the lines of `finetuner check`.

    Raises RecipeError with every mistake, or every foreign key that blocks.
    """
    tool = tool_of(parse_yaml(read_text(Path(path)), path).values)
    if tool is not AXOLOTL_TOOL:
        converted = convert(path, first_row=first_row)
        yield f"{path} is a recipe of {tool.name}:"
        yield from (f"  {note}" for note in converted.notes if verbose or not note.quiet)
        yield f"nothing blocks. Write it as a recipe of finetuner: finetuner convert {path} -o recipe.yml"
        return
    loaded = load(path, overrides)
    yield from (f"note: {note}" for note in loaded.notes if not note.quiet)
    quiet = [note for note in loaded.notes if note.quiet]
    if verbose and quiet:
        yield "accepted, without effect:"
        yield from (f"  {note}" for note in quiet)
    yield f"{path}: no mistakes"


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet. Raises RecipeError if it is, or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"'{path}' is there already. Name another file, or delete it.") from None
    except OSError as error:
        raise RecipeError(f"'{path}' cannot be written: {error.strerror}.") from error


def _join_adapter_keys(values: dict[str, Any]) -> None:
    """Write QLoRA for LoRA and a 4-bit base, which other tools say in two keys."""
    if values.get("load_in_4bit") and values.get("adapter") == "lora":
        values["adapter"] = "qlora"


def _counts(key: str, said: Mapping[str, Any]) -> bool:
    return FACTS[key].has_effect(said.get("adapter"))


def _written(
    document: YamlDocument,
    name: str,
    tool: Tool,
    given: list[str],
    notes: list[Note],
    defaults: Mapping[str, Any],
    remarks: list[str],
) -> str:
    """The text of the converted recipe. `given`: the keys of the file; `defaults`: what the tool does in silence."""
    lines = [
        SCHEMA_LINE,
        f"# {_in_one_line(name)}, a recipe of {tool.name}, converted. Check it: finetuner check THIS_FILE",
    ]
    lines += [f"# NOTE: {_in_one_line(remark)}." for remark in remarks]
    lines.append("")
    lines += _lines_of_the_file(document, given, defaults)
    if defaults:
        lines += ["", f"# what {tool.name} does when nothing is said"]
        for key, value in defaults.items():
            lines += _yaml({key: value})
    of_key = {key: note for note in notes for key in note.keys}
    dropped = [(key, of_key[key].message) for key in given if key in of_key and key not in document.values]
    dropped = [(key, message) for key, message in dropped if not message.startswith("is read as")]
    said = {line.removeprefix("# ").partition(":")[0] for line in lines} | {key for key, _ in dropped}
    dropped += [(key, _WITH_OTHERS) for key in given if key not in said]  # no key is dropped without a word
    if dropped:
        lines += ["", "# left out", *(f"# {key}: {_in_one_line(message)}" for key, message in dropped)]
    return "\n".join(lines) + "\n"


def _in_one_line(text: str) -> str:
    """A comment's text: a value of the file that it quotes must not go on in a line of its own, as keys."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _lines_of_the_file(document: YamlDocument, given: list[str], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Our lines in the file's order, each under the file's own line as a comment where that had another key."""
    places = {key: document.origin((key,), of_key=True) for key in document.values if key not in defaults}
    for key, origin in sorted(places.items(), key=lambda item: item[1].line if item[1] else 0):
        value = document.values[key]
        if value is None:
            continue
        line = origin.text.strip() if origin is not None else key
        written = line.partition(":")[0] if origin is not None and origin.line else key
        if key not in given or written != key:
            yield f"# {_in_one_line(line)}"
        yield from _yaml({key: value})


def _yaml(value: dict[str, Any]) -> list[str]:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1_000_000_000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue().rstrip("\n").splitlines()
