"""May a run go on from a checkpoint of that recipe? What must be equal, what may change, and what is said."""

from collections.abc import Mapping
from typing import Any

from finetuner.errors import CheckpointError

# Without these equal, the weights would not fit or the order of the rows would not be the same.
MUST_MATCH = (
    "base_model", "model", "tokenizer", "special_tokens", "tokens", "datasets", "test_datasets", "val_set_size",
    "sequence_len", "mix_by", "dataset_exact_deduplication", "streaming", "streaming_multipack_buffer_size",
    "excess_length_strategy", "train_on_inputs", "adapter", "lora_r", "lora_alpha", "lora_target_linear",
    "lora_target_modules", "lora_modules_to_save", "lora_fan_in_fan_out", "lora_model_dir", "peft_use_rslora",
    "peft_use_dora", "peft_init_lora_weights", "peft_layers_to_transform", "peft_layers_pattern",
    "unfrozen_parameters", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "seed",
    "sample_packing", "pretrain_multipack_attn", "group_by_length",
    "chat_template", "chat_template_jinja", "chat_template_kwargs", "eot_tokens",
    "min_sample_len", "rampup_batch_size",
)  # fmt: skip

# These have no part in what is learned; micro-batches and ranks are compared through the global batch.
NO_MATTER = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "saves_per_epoch", "save_total_limit",
    "logging_steps", "eval_steps", "evals_per_epoch", "eval_on_start", "eval_batch_size",
    "generate_samples", "generate_prompt", "micro_batch_size",
    "gradient_accumulation_steps", "trust_remote_code", "fsdp", "fsdp_config", "fsdp_version", "deepspeed",
    "dp_replicate_size", "dp_shard_size", "dataset_prepared_path", "max_dropped_fraction", "pad_to_sequence_len",
    "eval_sample_packing", "quantized_cache", "ddp_timeout",
    "eval_strategy", "save_strategy", "save_first_step", "save_only_model", "max_skipped_steps",
    "loss_watchdog_threshold", "loss_watchdog_patience", "early_stopping_patience", "early_stopping_threshold",
    "load_best_model_at_end", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "hub_model_id", "hub_strategy", "hub_private_repo", "use_tensorboard", "logging_dir",
    "use_wandb", "wandb_project", "wandb_entity",
    "wandb_name", "wandb_run_id", "wandb_mode", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name",
    "mlflow_run_name", "use_trackio", "trackio_project_name", "trackio_run_name", "trackio_space_id",
)  # fmt: skip


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


def _kind_of_state(recipe: Mapping[str, Any]) -> str:
    """Optimizers of one kind differ in where the same state lies."""
    name = str(recipe.get("optimizer", "")).removeprefix("paged_").removesuffix("_fused")
    return {"adamw_8bit": "adamw_bnb_8bit"}.get(name, name)


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Notes on keys that changed and may. Raises CheckpointError for those that may not."""
    before, after = saved["recipe"], now["recipe"]
    refused = [
        f"{key}: {before.get(key)} -> {after.get(key)}" for key in MUST_MATCH if before.get(key) != after.get(key)
    ]
    optimizers = [_kind_of_state(recipe) for recipe in (before, after)]
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
    free = [*MUST_MATCH, *NO_MATTER]
    changed = [key for key in sorted({*before, *after}) if key not in free and before.get(key) != after.get(key)]
    return [f"changed since the checkpoint: {key} {before.get(key)} -> {after.get(key)}" for key in changed]
