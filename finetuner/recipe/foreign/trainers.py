"""The keys of transformers' TrainingArguments, on which LLaMA-Factory and TRL stand.

Names and defaults: huggingface/transformers training_args.py (5.x), 2025 to 2026.
"""

from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, renamed, same, translated

TRAINING_ARGUMENTS: dict[str, Foreign] = {
    "model_name_or_path": renamed("base_model"),
    "per_device_train_batch_size": renamed("micro_batch_size"),
    "per_device_eval_batch_size": renamed("eval_batch_size"),
    "num_train_epochs": renamed("num_epochs"),
    "lr_scheduler_type": renamed("lr_scheduler"),
    "optim": renamed("optimizer"),
    "evaluation_strategy": renamed("eval_strategy"),
    "max_steps": translated(lambda steps: {"max_steps": steps} if steps != -1 else {}),
    "report_to": blocked(
        "naming trackers like this", "Write use_wandb, use_tensorboard or use_mlflow.", says_nothing=("none", ["none"])
    ),
    "run_name": ignored("output_dir tells runs apart"),
    "torch_dtype": ignored("bf16 and fp16 say what is computed in"),
    "dtype": ignored("bf16 and fp16 say what is computed in"),
    "use_liger_kernel": AXOLOTL["liger_rms_norm"],
    **same(
        "do_train do_eval do_predict log_level log_level_replica logging_strategy logging_first_step plot_loss "
        "preprocessing_num_workers dataset_num_proc overwrite_cache disable_tqdm logging_nan_inf_filter "
        "ddp_find_unused_parameters",
        ignored("it only steers that tool's screen, cache or processes"),
    ),
    **same("push_to_hub_model_id", blocked("this way to upload", "Write hub_model_id.")),
    **{
        key: AXOLOTL[key]
        for key in (
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_drop_last",
            "remove_unused_columns",
            "save_safetensors",
            "include_tokens_per_second",
            "auto_find_batch_size",
        )
    },
}


def lora_target(named: Any) -> Mapping[str, Any]:
    """Return our keys for the layers that LoRA adapts, given as a list, as one text with commas, or as all."""
    if named in ("all", "all-linear"):
        return {"lora_target_linear": True}
    names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
    return {"lora_target_modules": names}
