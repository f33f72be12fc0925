"""Whether a run may go on from a checkpoint: keys and rows that must be equal, and keys whose change is noted."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.errors import CheckpointError
from finetuner.recipe.optimizers import state_kind
from finetuner.recipe.schema import keys_where

# Which keys must match and which are free stands beside each key, in recipe/sections; every other one is noted.
MUST_MATCH_KEYS = keys_where(lambda facts: facts.resume == "must_match")
NOT_NOTED = {*MUST_MATCH_KEYS, *keys_where(lambda facts: facts.resume == "free")}


def resume_facts(
    recipe_values: Mapping[str, Any], *, num_rows: int, rows_sha256: str, global_batch: int
) -> dict[str, Any]:
    """Return what a checkpoint stores of its run, for a later run to be compared with (check_resume)."""
    return {
        "recipe": dict(recipe_values),
        "num_rows": num_rows,
        "rows_sha256": rows_sha256,
        "global_batch": global_batch,
    }


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a note for each changed key that a resumed run may change, given the facts of both runs.

    Raises CheckpointError with every difference under which the run cannot go on.
    """
    before, after = saved["recipe"], now["recipe"]
    refused = [*_recipe_differences(before, after), *_row_differences(saved, now)]
    if refused:
        raise CheckpointError(
            "the checkpoint is of another run; these differ:\n  "
            + "\n  ".join(refused)
            + "\nSet them back, or start again with another output_dir."
        )
    changed = [key for key in sorted({*before, *after}) if key not in NOT_NOTED and before.get(key) != after.get(key)]
    return [f"changed since the checkpoint: {key} {before.get(key)} -> {after.get(key)}" for key in changed]


def _recipe_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in MUST_MATCH_KEYS:
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)} -> {after.get(key)}"
    old, new = (state_kind(str(recipe.get("optimizer", ""))) for recipe in (before, after))
    if old != new:
        yield f"optimizer: {old} -> {new} (its state would not fit)"


def _row_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if saved["num_rows"] != now["num_rows"]:
        yield f"training rows: {saved['num_rows']} -> {now['num_rows']} (a data file has changed)"
    elif saved["rows_sha256"] != now["rows_sha256"]:
        yield "the tokens of the training rows (a data file, the tokenizer or its chat template has changed)"
    if saved["global_batch"] != now["global_batch"]:
        yield (
            f"rows per step: {saved['global_batch']} -> {now['global_batch']} (keep ranks x micro_batch_size x "
            "gradient_accumulation_steps equal)"
        )
