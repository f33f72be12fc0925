"""TRL's main keys, and its defaults where ours are others.

Names and defaults: huggingface/trl SFTConfig and ModelConfig, 2025 to 2026.
"""

from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, renamed, translated
from finetuner.recipe.foreign.trainers import TRAINING_ARGUMENTS, lora_target


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
    "lora_target_modules": translated(lora_target),
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
