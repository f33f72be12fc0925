"""LLaMA-Factory's main keys, and its defaults where ours are others.

Names and defaults: hiyouga/LLaMA-Factory src/llamafactory/hparams, 2025 to 2026.
"""

from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, renamed, same, translated
from finetuner.recipe.foreign.trainers import TRAINING_ARGUMENTS, lora_target


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
    "lora_target": translated(lora_target),
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
