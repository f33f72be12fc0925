"""The keys of transformers' TrainingArguments, on which LLaMA-Factory and TRL stand.

Names and defaults: huggingface/transformers training_args.py, 4.3x to 5.23, 2025 to 2026. A test holds this table, with
our own keys and Axolotl's, against all fields of the TrainingArguments that are installed.
"""

import json
from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, renamed, same, translated
from finetuner.recipe.foreign.rewriting import Rewriting

_SCREEN = "it only steers that tool's screen, cache or processes"
_RANKS = "the launcher says how ranks talk, and every trained weight is used in each step"
_EVALUATION = "held-out loss is taken the same way whatever the batches are"
_RESUME = "a resumed run goes on with the rows, the order and the random numbers that it would have had"
_DEVICE = "the device is the GPU where there is one; CUDA_VISIBLE_DEVICES= before the command hides it"
_LABELS = "labels come from the rows' own format"


TRAINING_ARGUMENTS: dict[str, Foreign] = {
    "model_name_or_path": renamed("base_model"),
    "per_device_train_batch_size": renamed("micro_batch_size"),
    "per_device_eval_batch_size": renamed("eval_batch_size"),
    "per_gpu_train_batch_size": renamed("micro_batch_size"),
    "per_gpu_eval_batch_size": renamed("eval_batch_size"),
    "num_train_epochs": renamed("num_epochs"),
    "lr_scheduler_type": renamed("lr_scheduler"),
    "optim": renamed("optimizer"),
    "evaluation_strategy": renamed("eval_strategy"),
    "activation_checkpointing": renamed("gradient_checkpointing"),
    "activation_checkpointing_kwargs": AXOLOTL["gradient_checkpointing_kwargs"],
    "max_steps": translated(lambda steps: {"max_steps": steps} if steps != -1 else {}),
    "report_to": blocked(
        "naming trackers like this", "Write use_wandb, use_tensorboard or use_mlflow.", says_nothing=("none", ["none"])
    ),
    "run_name": ignored("output_dir tells runs apart"),
    "project": ignored("trackers have keys of their own: wandb_project, trackio_project_name"),
    "torch_dtype": ignored("bf16 and fp16 say what is computed in"),
    "dtype": ignored("bf16 and fp16 say what is computed in"),
    "use_liger_kernel": AXOLOTL["liger_rms_norm"],
    "liger_kernel_config": AXOLOTL["liger_rms_norm"],
    "average_tokens_across_devices": Foreign(
        unsupported="a mean of the ranks' means",
        instead="Remove it: every trained token counts the same, on whatever rank it is.",
        only_value=True,
    ),
    "train_sampling_strategy": Foreign(
        unsupported="rows in the order of the file",
        instead="Remove it: rows are shuffled again in each epoch.",
        says_nothing=("random", "group_by_length"),  # the latter becomes group_by_length before
    ),
    "parallelism_config": blocked("splitting one sequence or one layer over several GPUs", "Write `fsdp` instead."),
    "accelerator_config": Foreign(
        unsupported="settings of Accelerate in a recipe",
        instead="Remove them: batches are cut for all ranks from one order of rows.",
        says_nothing=({"split_batches": False}, {"dispatch_batches": None}),
    ),
    "eval_delay": blocked("evaluations that begin late", "Remove it.", says_nothing=(0, 0.0)),
    "metric_for_best_model": AXOLOTL["metric_for_best_model"],
    "full_determinism": ignored("random numbers follow from `seed`; kernels are those of PyTorch", loud=True),
    "use_cpu": ignored(
        "the device is the GPU where there is one; hide it (CUDA_VISIBLE_DEVICES=) for a CPU", loud=True
    ),
    "no_cuda": ignored(
        "the device is the GPU where there is one; hide it (CUDA_VISIBLE_DEVICES=) for a CPU", loud=True
    ),
    "hub_revision": blocked("an upload to a branch", says_nothing=("main",)),
    "save_on_each_node": blocked("results on every node's own disk", "Write output_dir on a disk all nodes share."),
    "trackio_bucket_id": blocked("Trackio's buckets", "Write trackio_space_id."),
    "trackio_static_space_id": blocked("Trackio's static Spaces", "Write trackio_space_id."),
    "bf16_full_eval": ignored("evaluation computes in the same number format as training", loud=True),
    "fp16_full_eval": ignored("evaluation computes in the same number format as training", loud=True),
    "use_cache": ignored("training keeps no cache of keys and values"),
    "torch_empty_cache_steps": ignored("it changes the memory that is kept free, and nothing that is trained"),
    "include_num_input_tokens_seen": ignored("tokens are always counted in metrics.jsonl"),
    "enable_jit_checkpoint": ignored("a run that is asked to stop (SIGTERM) always saves a checkpoint"),
    "hub_always_push": ignored("an upload is always finished before the next begins"),
    **same("ignore_data_skip restore_callback_states_from_checkpoint", ignored(_RESUME, loud=True)),
    **same(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics include_inputs_for_metrics",
        ignored(_EVALUATION),
    ),
    **same("label_names length_column_name", ignored(_LABELS)),
    **same("ddp_find_unused_parameters ddp_static_graph ddp_backend", ignored(_RANKS)),
    **same(
        "do_train do_eval do_predict log_level log_level_replica logging_strategy logging_first_step plot_loss "
        "preprocessing_num_workers dataset_num_proc overwrite_cache disable_tqdm logging_nan_inf_filter "
        "log_on_each_node skip_memory_metrics",
        ignored(_SCREEN),
    ),
    **same(
        "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order",
        AXOLOTL["dataloader_num_workers"],
    ),
    **same("push_to_hub_model_id push_to_hub_organization", blocked("this way to upload", "Write hub_model_id.")),
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

# How report_to names a tracker -> our key, and our key for the run's name there.
TRACKERS: dict[str, tuple[str, str | None]] = {
    "wandb": ("use_wandb", "wandb_name"),
    "tensorboard": ("use_tensorboard", None),
    "mlflow": ("use_mlflow", "mlflow_run_name"),
    "trackio": ("use_trackio", "trackio_run_name"),
}


# Keys of a tracker that would switch it on here, and mean nothing there unless report_to names it.
_TRACKER_KEYS: dict[str, tuple[str, ...]] = {
    "wandb": ("wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_mode"),
    "tensorboard": ("logging_dir",),
    "trackio": ("trackio_space_id",),
}


def lora_target(named: Any) -> Mapping[str, Any]:
    """Return our keys for the layers that LoRA adapts, given as a list, as one text with commas, or as all."""
    if named in ("all", "all-linear"):
        return {"lora_target_linear": True}
    names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
    return {"lora_target_modules": names}


def rewrite_trackers(rewriting: Rewriting) -> None:
    """Rewrite report_to, a name or a list, and the run's name and project for the trackers it names."""
    named = rewriting.get("report_to")
    names = [named] if isinstance(named, str) else named
    run, project = rewriting.get("run_name"), rewriting.get("project", "huggingface")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = [] if named is None else ["?"]
    unknown = [name for name in names if name not in TRACKERS and name != "none"]
    if unknown:
        advice = (
            "Name them: wandb, tensorboard, mlflow, trackio."
            if unknown == ["all"]
            else "Remove it; metrics.jsonl has every figure. wandb, tensorboard, mlflow and trackio can be reported to."
        )
        rewriting.refuse("report_to", f"report_to: '{unknown[0]}' is not supported yet: this tracker. {advice}")
        return
    used = [name for name in names if name != "none"]
    for name, keys in _TRACKER_KEYS.items():
        for key in keys if name not in used else ():
            rewriting.ignore(key, f"report_to does not name {name}", loud=True)
    for name in used:
        key, name_key = TRACKERS[name]
        rewriting.put(key, True, of="report_to")
        if run is not None and name_key is not None:
            rewriting.put(name_key, str(run), of="run_name")
    if "wandb" in used and not rewriting.get("wandb_project"):
        rewriting.defaults["wandb_project"] = "huggingface"  # unless WANDB_PROJECT says otherwise there
    if "trackio" in used and not rewriting.get("trackio_project_name"):
        rewriting.defaults["trackio_project_name"] = str(project)
    if used and run is not None:
        rewriting.take("run_name")
    if used:
        rewriting.take("report_to")
    else:
        rewriting.ignore("report_to", "no tracker is named")


def rewrite_uploads(rewriting: Rewriting) -> None:
    """Rewrite push_to_hub and hub_*: without push_to_hub nothing is uploaded, whatever the others say."""
    values = rewriting.document.values
    hub_keys = ("hub_model_id", "hub_strategy", "hub_private_repo")
    if rewriting.get("push_to_hub") is not True:
        for key in hub_keys:
            rewriting.ignore(key, "push_to_hub is not true, so that nothing is uploaded", loud=key == "hub_model_id")
        return
    output_dir = rewriting.get("output_dir")
    if not rewriting.get("hub_model_id"):
        if not isinstance(output_dir, str) or not output_dir.strip("/. "):
            rewriting.refuse("push_to_hub", "push_to_hub needs hub_model_id: the repository to upload to.")
            return
        rewriting.put("hub_model_id", output_dir.rstrip("/").rpartition("/")[2], of="push_to_hub")
    rewriting.take("push_to_hub")
    rewriting.defaults["hub_strategy"] = "every_save"
    if "hub_private_repo" not in values:
        rewriting.remark(
            "a repository that is made for the upload is private here; the other tool's is public unless its owner's "
            "settings say otherwise: write `hub_private_repo: false` for that"
        )


def rewrite_schedule(rewriting: Rewriting) -> None:
    """Rewrite the warmup as transformers reads it: steps stand above the ratio, and `constant` has none."""
    options = rewriting.get("lr_scheduler_kwargs")
    if isinstance(options, str):  # a block may be written as JSON there
        try:
            rewriting.put("lr_scheduler_kwargs", json.loads(options), of="lr_scheduler_kwargs", quiet=True)
        except ValueError:
            rewriting.refuse("lr_scheduler_kwargs", "lr_scheduler_kwargs is a text, but no JSON. Write a block.")
    shape = rewriting.get("lr_scheduler_type")
    if shape == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            reason = "lr_scheduler_type: constant has no warmup there; constant_with_warmup has"
            rewriting.ignore(key, reason, loud=bool(rewriting.get(key)))
    elif "warmup_ratio" in rewriting.document.values:
        key = "warmup_ratio" if rewriting.get("warmup_steps") else "warmup_steps"
        rewriting.ignore(key, "warmup_steps stands above warmup_ratio" if key == "warmup_ratio" else "it is 0")
    if isinstance(rewriting.get("max_steps"), int) and rewriting.get("max_steps") > 0:
        rewriting.ignore("num_train_epochs", "max_steps says how long to train")
    if rewriting.get("train_sampling_strategy") == "group_by_length":
        rewriting.take("train_sampling_strategy")
        rewriting.put("group_by_length", True, of="train_sampling_strategy")


def rewrite_times(rewriting: Rewriting, *, save_steps: int = 500, logging_steps: float = 500) -> None:
    """Rewrite when checkpoints are saved and held-out rows looked at; a strategy that is not `steps` ignores steps.

    `save_steps` and `logging_steps`: the tool's defaults; eval_steps is as logging_steps where it is not given.
    """
    saves = rewriting.get("save_strategy", "steps")
    if saves == "steps":
        rewriting.defaults["save_steps"] = save_steps
    else:
        rewriting.ignore("save_steps", f"save_strategy is {saves}")
    rewriting.defaults["save_total_limit"] = 0  # all are kept
    evaluates = rewriting.get("eval_strategy", rewriting.get("evaluation_strategy", "no"))
    if evaluates == "steps":
        rewriting.defaults["eval_steps"] = rewriting.get("logging_steps", logging_steps)
    else:
        rewriting.ignore("eval_steps", f"eval_strategy is {evaluates}")
    if evaluates != "no":
        rewriting.defaults["eval_batch_size"] = 8


def rewrite_precision(rewriting: Rewriting) -> None:
    """Say what a model that is loaded in 16 bits differs in: its weights are not trained in them here."""
    key = "dtype" if rewriting.get("dtype") is not None else "torch_dtype"
    dtype = str(rewriting.get(key, "float32")).removeprefix("torch.")
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    if precision is None:
        return
    if rewriting.get("bf16") is False and not rewriting.get("fp16") and precision == "bf16":
        rewriting.put("bf16", True, of=key)
    reason = f"trained weights are always fp32 here, where the other tool would keep them in {dtype}; bf16 and fp16 say"
    rewriting.ignore(key, f"{reason} what is computed in", loud=not rewriting.get("use_peft"))
