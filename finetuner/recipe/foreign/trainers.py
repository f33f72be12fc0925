"""LLaMA-Factory's and TRL's main keys. Both stand on transformers' TrainingArguments, which come first.

Names and defaults: huggingface/transformers training_args.py (5.x), hiyouga/LLaMA-Factory src/llamafactory/hparams,
huggingface/trl SFTConfig and ModelConfig, 2025 to 2026.
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


def _lora_target(named: Any) -> Mapping[str, Any]:
    if named in ("all", "all-linear"):
        return {"lora_target_linear": True}
    names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
    return {"lora_target_modules": names}


def _finetuning_type(kind: Any) -> Mapping[str, Any]:
    return {} if kind == "full" else {"adapter": kind}


def _named_datasets(names: Any) -> Mapping[str, Any]:
    listed = names.split(",") if isinstance(names, str) else list(names)
    return {"datasets": [{"path": f"data/{str(name).strip()}.json", "type": "alpaca"} for name in listed]}


def _flash_attn(kind: Any) -> Mapping[str, Any]:
    return {"attn_implementation": {"fa2": "flash_attention_2", "disabled": "eager"}.get(kind, kind)}


LLAMA_FACTORY: dict[str, Foreign] = TRAINING_ARGUMENTS | {
    "stage": Foreign(unsupported="stages other than sft", says_nothing=("sft",), instead="Only sft can be run."),
    "finetuning_type": translated(_finetuning_type),
    "adapter_name_or_path": renamed("lora_model_dir"),
    "lora_rank": renamed("lora_r"),
    "lora_target": translated(_lora_target),
    "additional_target": translated(lambda names: {"lora_modules_to_save": [n.strip() for n in names.split(",")]}),
    "use_rslora": renamed("peft_use_rslora"),
    "use_dora": renamed("peft_use_dora"),
    "quantization_bit": translated(lambda bits: {"load_in_4bit": True, "adapter": "qlora"} if bits == 4 else {
        "load_in_8bit": True}),
    "quantization_method": Foreign(unsupported="quantizing without bitsandbytes", says_nothing=("bnb", "bitsandbytes")),
    "double_quantization": ignored("4-bit bases are double quantized unless bnb_config_kwargs says otherwise"),
    "cutoff_len": renamed("sequence_len"),
    "dataset": translated(_named_datasets),
    "eval_dataset": blocked("held-out data by its name in dataset_info.json", "Name a file under test_datasets."),
    "tokenized_path": renamed("dataset_prepared_path"),
    "dataset_dir": ignored("datasets are named by their files"),
    "template": ignored("the tokenizer's own chat template is used; chat_template names another", loud=True),
    "val_size": renamed("val_set_size"),
    "packing": renamed("sample_packing"),
    "neat_packing": renamed("sample_packing"),
    "flash_attn": translated(_flash_attn),
    "train_on_prompt": renamed("train_on_inputs"),
    "disable_gradient_checkpointing": translated(lambda off: {"gradient_checkpointing": not off}),
    "enable_liger_kernel": AXOLOTL["liger_rms_norm"],
    "max_samples": ignored("write max_samples under each dataset", loud=True),
    "pure_bf16": blocked("training in pure bf16", "Write bf16: true; trained weights stay fp32."),
    "mask_history": blocked("training the last turn alone", "Put `train: false` into the other turns."),
    "resize_vocab": ignored("embeddings grow with the vocabulary"),
    **same("streaming buffer_size mix_strategy", blocked("streaming corpora")),
    **same("pref_beta pref_loss ref_model reward_model kto_chosen_weight kto_rejected_weight dpo_label_smoothing",
             blocked("preference and reinforcement learning")),
    **same("freeze_trainable_layers freeze_trainable_modules", blocked("freeze tuning", "Use unfrozen_parameters.")),
    **same("use_galore use_badam use_apollo use_llama_pro pissa_init pissa_convert", blocked("this way of training")),
    **same("predict_with_generate max_new_tokens top_p temperature", blocked("generating during evaluation")),
    "image_max_pixels": blocked("images and audio"),
    "video_max_pixels": blocked("images and audio"),
}  # fmt: skip

# LLaMA-Factory's defaults where ours are others.
LLAMA_FACTORY_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 5e-5, "lr_scheduler": "linear", "sequence_len": 2048,
    "excess_length_strategy": "truncate", "gradient_checkpointing": True, "lora_r": 8, "logging_steps": 500,
}  # fmt: skip


def _mixer(mixed: Any) -> Mapping[str, Any]:
    return {"datasets": [{"path": path, "type": "chat_template"} for path in mixed]}


def _mixture(mixed: Any) -> Mapping[str, Any]:
    entries = [
        {"path": one["id"], "type": "chat_template", "split": one.get("split", "train")}
        | ({"name": one["config"]} if one.get("config") not in (None, "default") else {})
        for one in mixed["datasets"]
    ]
    held_out = mixed.get("test_split_size")
    return {"datasets": entries} | ({"val_set_size": held_out} if held_out else {})


def _peft(on: Any) -> Mapping[str, Any]:
    return {"adapter": "lora"} if on else {}


TRL: dict[str, Foreign] = TRAINING_ARGUMENTS | {
    "model_revision": blocked("a revision of the model", "Give its folder.", says_nothing=("main",)),
    "use_peft": translated(_peft),
    "lora_target_modules": translated(_lora_target),
    "use_rslora": renamed("peft_use_rslora"),
    "use_dora": renamed("peft_use_dora"),
    "lora_task_type": ignored("it is always CAUSAL_LM"),
    "bnb_4bit_quant_type": translated(lambda kind: {"bnb_config_kwargs": {"bnb_4bit_quant_type": kind}}),
    "use_bnb_nested_quant": ignored("4-bit bases are double quantized unless bnb_config_kwargs says otherwise"),
    "dataset_name": translated(lambda path: {"datasets": [{"path": path, "type": "chat_template"}]}),
    "dataset_mixer": translated(_mixer),
    "dataset_mixture": translated(_mixture),
    "tokenizer_name_or_path": renamed("tokenizer"),
    "use_flash_attention_2": translated(lambda on: {"attn_implementation": "auto"} if on else {}),
    "bnb_4bit_quant_storage": ignored("4-bit weights are stored as bytes that any engine shards"),
    "dataset_config": blocked("this way to name a dataset's configuration", "Write `name` under the dataset."),
    "dataset_train_split": Foreign(unsupported="this way to name a split", instead="Write `split` under the dataset.",
                                   says_nothing=("train",)),
    "dataset_test_split": ignored("write test_datasets for rows that are held out", loud=True),
    "dataset_splits": ignored("write `split` under the datasets and test_datasets", loud=True),
    "dataset_configs": ignored("write `name` under the datasets", loud=True),
    "max_seq_length": renamed("sequence_len"),
    "max_length": renamed("sequence_len"),
    "packing": renamed("sample_packing"),
    "eval_packing": renamed("eval_sample_packing"),
    "assistant_only_loss": ignored("assistant turns alone are trained on unless train_on_inputs says otherwise"),
    "completion_only_loss": ignored("answers alone are trained on unless train_on_inputs says otherwise"),
    "dataset_text_field": blocked("one text column", "Write `type: completion` and `field` under the dataset."),
    "dataset_kwargs": ignored("each format adds the special tokens that it needs"),
    "eos_token": translated(lambda token: {"special_tokens": {"eos_token": token}}),
    "chat_template_path": blocked("a template in a file", "Write chat_template: jinja and chat_template_jinja."),
    "padding_free": ignored("sample_packing does this job"),
    "use_kernels": AXOLOTL["use_kernels"],
}  # fmt: skip

TRL_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 2e-5, "lr_scheduler": "linear", "sequence_len": 1024,
    "excess_length_strategy": "truncate", "gradient_checkpointing": True, "logging_steps": 10,
}  # fmt: skip
