"""Rules that span keys, and files that must exist. Each finding names the key to change."""

from collections.abc import Iterator

from finetuner.recipe.rules import (
    adapter,
    data,
    guards,
    model_config,
    optimizer,
    quantization,
    scratch,
    sharding,
    streaming,
    tokenizer,
    tracking,
    training,
)
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.rules.files import DATA_SUFFIXES, PACKING_SUFFIXES, data_suffix, file_findings, looks_local
from finetuner.recipe.rules.sharding import deepspeed_findings
from finetuner.recipe.rules.unused_keys import given_findings, given_notes

__all__ = [
    "DATA_SUFFIXES",
    "PACKING_SUFFIXES",
    "RULES",
    "Finding",
    "data_suffix",
    "deepspeed_findings",
    "file_findings",
    "given_findings",
    "given_notes",
    "looks_local",
    "rule_findings",
]

RULES: tuple[Rule, ...] = (
    *training.RULES,
    *optimizer.RULES,
    *adapter.RULES,
    *quantization.RULES,
    *scratch.RULES,
    *model_config.RULES,
    *data.RULES,
    *streaming.RULES,
    *tokenizer.RULES,
    *guards.RULES,
    *sharding.RULES,
    *tracking.RULES,
)


def rule_findings(values: Values) -> Iterator[Finding]:
    """Apply every rule whose keys are all valid."""
    for keys, rule in RULES:
        if all(key in values for key in keys):
            yield from rule(values)
