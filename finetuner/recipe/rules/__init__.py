"""Rules that span keys, and files that must exist. Each finding names the key that should change."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.recipe.rules import adapter, data, guards, training
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.rules.files import DATA_SUFFIXES, file_findings, looks_local

__all__ = ["DATA_SUFFIXES", "RULES", "Finding", "file_findings", "given_findings", "looks_local", "rule_findings"]

RULES: tuple[Rule, ...] = (*training.RULES, *adapter.RULES, *data.RULES, *guards.RULES)


def rule_findings(values: Values) -> Iterator[Finding]:
    """Apply every rule whose keys are all valid."""
    for keys, rule in RULES:
        if all(key in values for key in keys):
            yield from rule(values)


def given_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that were written although they can have no effect; a default in their place would be no mistake."""
    if raw.get("adapter") is None:
        for key in raw:
            if key.startswith("lora_") and raw[key] is not None:
                yield Finding(
                    (key,), f"{key} has no effect without `adapter: lora`. Add that line, or remove this one."
                )
