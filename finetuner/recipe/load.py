"""Reads a recipe's file and overrides, and reports every mistake at once."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuner.errors import RecipeError
from finetuner.recipe.environment import fill_in_environment
from finetuner.recipe.foreign.tools import AXOLOTL_TOOL, tool_of
from finetuner.recipe.foreign.translate import translate
from finetuner.recipe.fsdp_prefix import drop_fsdp_prefix
from finetuner.recipe.overrides import apply_override
from finetuner.recipe.problems import (
    Note,
    Origin,
    Problem,
    did_you_mean,
    grouped,
    render_problems,
)
from finetuner.recipe.rules import deepspeed_findings, file_findings, given_findings, given_notes, rule_findings
from finetuner.recipe.schema import Recipe
from finetuner.recipe.validate import validate
from finetuner.recipe.yaml_document import MAX_RECIPE_BYTES, YamlDocument, parse_yaml


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, and notes to the user on how it was read."""

    recipe: Recipe
    notes: tuple[Note, ...] = ()
    origins: dict[str, Origin] = field(default_factory=dict)  # where each key that is given was written


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe and apply `key=value` overrides. Raises RecipeError that lists every mistake."""
    return load(path, overrides, check_files=check_files).recipe


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = (), *, check_files: bool = True) -> Loaded:
    """Read a recipe as load_recipe does, and return the notes too.

    `check_files=False` does not look whether named files exist.
    """
    return _load_text(read_text(Path(path)), str(path), overrides, check_files=check_files)


def load_values(values: dict[str, Any], source: str, overrides: tuple[str, ...] | list[str] = ()) -> Loaded:
    """Read keys that a command puts together as `load` reads a file's; `source` names them in messages."""
    return _load_text(json.dumps(values, indent=0), source, overrides, check_files=True)


def _load_text(text: str, source: str, overrides: tuple[str, ...] | list[str], *, check_files: bool) -> Loaded:
    document = parse_yaml(text, source)
    drop_fsdp_prefix(document)
    for number, override in enumerate(overrides, 1):
        apply_override(document, number, override)
    drop_fsdp_prefix(document, overrides=True)
    fill_in_environment(document)
    if not document.is_complete:
        raise RecipeError(render_problems(source, document.problems))
    tool = tool_of(document.values)
    if tool is not AXOLOTL_TOOL:
        raise RecipeError(
            f"'{source}' is a recipe of {tool.name}. Write it as one of finetuner:\n"
            f"  finetuner convert {source} -o recipe.yml"
        )
    return resolve(document, translate(document), check_files=check_files)


def resolve(document: YamlDocument, notes: list[Note], *, check_files: bool) -> Loaded:
    """Validate a document whose keys are ours. Raises RecipeError that lists every mistake, the document's own too."""
    values, recipe = validate(document)
    findings = [*rule_findings(values), *given_findings(document.values)]
    findings += file_findings(document.values) if check_files else ()
    findings += deepspeed_findings(document.values, check_files=check_files)
    document.problems += [
        Problem(f.message, document.origin(f.where), tuple(filter(None, map(document.origin, f.also))))
        for f in findings
    ]
    if document.problems or recipe is None:
        raise RecipeError(render_problems(document.source, document.problems))
    boilerplate = [
        Note((str(where[0]),), message, document.origin(where, of_key=True))
        for where, message in given_notes(document.values)
    ]
    given = {key: document.keys.get((key,)) for key, value in document.values.items() if value is not None}
    return Loaded(recipe, grouped([*notes, *boilerplate]), {key: place for key, place in given.items() if place})


def read_text(path: Path) -> str:
    """Return the text of a recipe's file. Raises RecipeError, also for a file too large to be a recipe."""
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
