"""Reads DeepSpeed's JSON from a file or a recipe's block, and finds its mistakes.

DeepSpeed itself passes over a top-level block that it does not know, `ZeRO_optimization` for one, and then shards
nothing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetuner.errors import RecipeError
from finetuner.recipe.problems import did_you_mean

# Blocks that plan/zero.py fills in and checks against the recipe.
RESOLVED = (
    "bf16", "bfloat16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
# Blocks that DeepSpeed gets as they are.
PASSED = (
    "aio", "comms_logger", "communication_data_type", "data_types", "dump_state", "flops_profiler",
    "gradient_predivide_factor", "keep_in_fp32_modules", "memory_breakdown", "prescale_gradients", "steps_per_print",
    "wall_clock_breakdown",
)  # fmt: skip
REFUSED = {
    "activation_checkpointing": "write `gradient_checkpointing: true` in the recipe",
    "amp": "write `bf16: true` in the recipe",
    "autotuning": "it starts runs of its own",
    "checkpoint": "checkpoints are finetuner's own (safetensors)",
    "compile": "compilation under DeepSpeed is not supported",
    "csv_monitor": "metrics are in metrics.jsonl",
    "curriculum_learning": "the order of rows is finetuner's own",
    "data_efficiency": "the order of rows is finetuner's own",
    "elasticity": "another number of ranks would change the batch",
    "lora": "write `adapter: lora` in the recipe",
    "optimizer": "the recipe's `optimizer` is used",
    "pipeline": "pipeline stages are not supported",
    "scheduler": "the recipe's `lr_scheduler` is used",
    "tensor_parallel": "tensor parallelism is not supported",
    "tensorboard": "metrics are in metrics.jsonl",
    "torch_autocast": "write `bf16: true` in the recipe",
    "wandb": "trackers are the recipe's",
}
ZERO_KEYS = (
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "elastic_checkpoint",
    "ignore_unused_parameters", "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "overlap_comm", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "stage", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size", "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)  # fmt: skip
MAX_BYTES = 1_000_000


def read_deepspeed(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a recipe's `deepspeed`. Raises RecipeError if the file cannot be read."""
    if not isinstance(given, str):
        return dict(given)
    path = Path(given).expanduser()
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"'{given}' has more than {MAX_BYTES:,} bytes. Is it DeepSpeed's JSON?")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        listed = f" Files in {path.parent}: {', '.join(near)}." if near else ""
        raise RecipeError(
            f"there is no DeepSpeed file '{given}' (seen from {Path.cwd()}).{did_you_mean(path.name, near)}{listed}"
        ) from error
    except OSError as error:
        raise RecipeError(f"'{given}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"'{given}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"'{given}' is not a block of keys, as DeepSpeed's JSON is.")
    return config


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(n for n in names if names.count(n) > 1)}' is given twice")
    return found


def deepspeed_mistakes(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the key, what is wrong) for every mistake that can be seen without a world."""
    for key in config:
        if key in REFUSED:
            yield (key,), f"DeepSpeed's block '{key}' is not used here: {REFUSED[key]}. Remove it."
        elif key not in RESOLVED and key not in PASSED:
            yield (key,), _unknown(str(key), (*RESOLVED, *PASSED), "block")
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping):
        yield from _zero_mistakes(zero)
    elif zero is not None:
        yield ("zero_optimization",), 'zero_optimization is a block such as {"stage": 2}.'
    elif not any(str(key).lower() == "zero_optimization" for key in config):
        yield (), 'nothing would be sharded: add {"zero_optimization": {"stage": 1}}, or remove `deepspeed`.'


def _zero_mistakes(zero: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for key in zero:
        if key not in ZERO_KEYS:
            yield ("zero_optimization", key), _unknown(str(key), ZERO_KEYS, "key of zero_optimization")
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        shown = json.dumps(stage)
        yield ("zero_optimization", "stage"), f"the stage is {shown}, but must be 1, 2 or 3 (0 would shard nothing)."
    if zero.get("offload_param") and stage in (1, 2) and _device(zero["offload_param"]) != "none":
        yield ("zero_optimization", "offload_param"), "only stage 3 can offload parameters. Remove offload_param."


def _device(block: Any) -> Any:
    return block.get("device", "none") if isinstance(block, Mapping) else block


def _unknown(key: str, known: tuple[str, ...], what: str) -> str:
    right = next((name for name in known if name == key.lower()), None)
    hint = f" Write '{right}'; DeepSpeed would pass over '{key}' in silence." if right else did_you_mean(key, known)
    return f"DeepSpeed has no {what} '{key}'.{hint}"
