"""May a run go on from a checkpoint of that recipe? What must be equal, what may change, and what is said."""

from collections.abc import Mapping
from typing import Any

from finetuner.errors import CheckpointError
from finetuner.recipe.optimizers import state_kind
from finetuner.recipe.schema import keys_where

# Which keys must match and which are free stands beside each key, in recipe/sections; every other one is noted.
MUST_MATCH = keys_where(lambda facts: facts.resume == "must_match")
NOT_NOTED = {*MUST_MATCH, *keys_where(lambda facts: facts.resume == "free")}


def resume_facts(
    recipe_values: Mapping[str, Any], *, num_rows: int, rows_sha256: str, global_batch: int
) -> dict[str, Any]:
    """What a checkpoint records, to be compared with what a later run would do."""
    return {
        "recipe": dict(recipe_values),
        "num_rows": num_rows,
        "rows_sha256": rows_sha256,
        "global_batch": global_batch,
    }


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Notes on keys that changed and may. Raises CheckpointError for those that may not."""
    before, after = saved["recipe"], now["recipe"]
    refused = [
        f"{key}: {before.get(key)} -> {after.get(key)}" for key in MUST_MATCH if before.get(key) != after.get(key)
    ]
    optimizers = [state_kind(str(recipe.get("optimizer", ""))) for recipe in (before, after)]
    if optimizers[0] != optimizers[1]:
        refused.append(f"optimizer: {optimizers[0]} -> {optimizers[1]} (its state would not fit)")
    if saved["num_rows"] != now["num_rows"]:
        refused.append(f"training rows: {saved['num_rows']} -> {now['num_rows']} (a data file has changed)")
    elif saved["rows_sha256"] != now["rows_sha256"]:
        refused.append("the tokens of the training rows (a data file, the tokenizer or its chat template has changed)")
    if saved["global_batch"] != now["global_batch"]:
        refused.append(
            f"rows per step: {saved['global_batch']} -> {now['global_batch']} (keep ranks x micro_batch_size x "
            "gradient_accumulation_steps equal)"
        )
    if refused:
        raise CheckpointError(
            "the checkpoint is of another run; these differ:\n  "
            + "\n  ".join(refused)
            + "\nSet them back, or start anew with another output_dir."
        )
    changed = [key for key in sorted({*before, *after}) if key not in NOT_NOTED and before.get(key) != after.get(key)]
    return [f"changed since the checkpoint: {key} {before.get(key)} -> {after.get(key)}" for key in changed]
