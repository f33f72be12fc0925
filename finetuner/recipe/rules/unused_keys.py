"""Rules about keys that were written although they can have no effect; leaving them out would be no mistake.

Where `adapter` is missing beside keys of an adapter, it was probably forgotten; where it is written and empty, they are
the boilerplate of a template, which recipe/foreign/rewordings.py leaves out. How often to evaluate is boilerplate
in any case, and noted.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.recipe.problems import KeyPath
from finetuner.recipe.rules.base import Finding
from finetuner.recipe.schema import keys_where

_ADAPTER_KEYS = frozenset(keys_where(lambda facts: facts.needs == "lora"))
_EVALUATION_KEYS = ("eval_steps", "evals_per_epoch", "eval_on_start")


def given_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the keys of an adapter in a recipe without the key `adapter`: mistakes."""
    if "adapter" not in raw:
        for key in _adapter_keys(raw):
            message = f"{key} has no effect without `adapter: lora`. Add that line, or remove this one."
            yield Finding((key,), message)


def given_notes(raw: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield the boilerplate, which is only noted, and why each key has no effect."""
    if raw.get("lora_target_linear") is True and raw.get("lora_target_modules"):
        yield ("lora_target_modules",), "without effect: lora_target_linear adapts every linear layer"
    if raw.get("hub_strategy") == "every_save" and not raw.get("hub_model_id"):
        yield ("hub_strategy",), "without effect: hub_model_id does not say where to upload to"
    if not _has_held_out_rows(raw):
        missing = raw.get("val_set_size") is None  # templates say how often, and leave out of what
        for key in _evaluation_keys(raw):
            yield (key,), "without effect: no row is held out" + "; `val_set_size: 0.05` holds some out" * missing


def _adapter_keys(raw: Mapping[str, Any]) -> list[str]:
    return [key for key, value in raw.items() if key in _ADAPTER_KEYS and value not in (None, False)]


def _evaluation_keys(raw: Mapping[str, Any]) -> list[str]:
    return [key for key in _EVALUATION_KEYS if raw.get(key)]


def _has_held_out_rows(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("val_set_size") or raw.get("test_datasets"))
