"""Writes a Recipe as YAML that loads to the same Recipe."""

import io
import json
from typing import Any

from ruamel.yaml import YAML

from finetuner.recipe.schema import FACTS, Recipe
from finetuner.redaction import without_secrets


def flat_values(recipe: Recipe) -> dict[str, Any]:
    """Return key -> plain value (bool, number, text, list or dict), for every key that is set and has an effect."""
    out: dict[str, Any] = {}
    for _, section in recipe:
        out |= section.model_dump(mode="json", exclude_none=True)
    # a key without effect would be refused when the dump is loaded
    adapter = recipe.adapter.adapter
    return {key: value for key, value in out.items() if value != {} and FACTS[key].has_effect(adapter)}


def dump_recipe(recipe: Recipe, heading: str) -> str:
    """Return the recipe as YAML text under a comment, with every default written out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1_000_000_000  # a text that is wrapped does not always come back as it was
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the sections' order
    stream = io.StringIO()
    values = without_secrets(flat_values(recipe))
    # ruamel writes Unicode's own line breaks so that they read back as others; escaped, they stay what they are.
    yaml.allow_unicode = not any(mark in json.dumps(values, ensure_ascii=False) for mark in "\x85\u2028\u2029")
    yaml.dump(values, stream)
    return f"# {heading}\n{stream.getvalue()}"
