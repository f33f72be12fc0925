"""TRL's keys that mean something only together: rows, adapter, template, packing, uploads, trackers, times.

huggingface/trl 1.16.0: its script for sft, SFTTrainer and get_quantization_config; alignment-handbook's and open-r1's
configurations for `chat_template`.
"""

from pathlib import Path
from typing import Any

from finetuner.recipe.foreign.rewriting import Rewriting
from finetuner.recipe.foreign.trainers import (
    rewrite_precision,
    rewrite_schedule,
    rewrite_times,
    rewrite_trackers,
    rewrite_uploads,
)
from finetuner.recipe.foreign.trl_rows import rewrite_rows

_LORA_KEYS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "lora_task_type", "use_rslora", "use_dora",
)  # fmt: skip
_FLASH_KERNELS = {
    "flash_attention_3", "kernels-community/flash-attn", "kernels-community/flash-attn2",
    "kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3",
}  # fmt: skip
_OLDER_KEYS = {
    "max_seq_length", "evaluation_strategy", "use_flash_attention_2", "dataset_mixer", "dataset_splits",
    "num_of_sequences", "chars_per_token", "dataset_batch_size",
}  # fmt: skip
_FOUR_BIT_KEYS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")

_SWITCHES = (
    "use_peft load_in_4bit load_in_8bit use_bnb_nested_quant packing assistant_only_loss completion_only_loss "
    "push_to_hub dataset_streaming overwrite_output_dir bf16 fp16 eval_packing padding_free"
)


def rewrite_trl(rewriting: Rewriting) -> None:
    """Rewrite all of TRL's keys that depend on one another; those that are left mean something by themselves."""
    rewriting.require_truth(_SWITCHES)
    _model_arguments(rewriting)
    _attention(rewriting)
    rewrite_rows(rewriting)
    _template(rewriting)
    _length_and_packing(rewriting)
    _adapter(rewriting)
    _loss(rewriting)
    rewrite_precision(rewriting)
    if rewriting.get("fp16") is not True and rewriting.get("bf16") is None:
        rewriting.defaults["bf16"] = True
    rewrite_schedule(rewriting)
    rewrite_times(rewriting, logging_steps=10)
    rewrite_uploads(rewriting)
    rewrite_trackers(rewriting)
    reason = "it would delete an earlier run here, and TRL goes on in the folder: write it yourself if that is meant"
    rewriting.ignore("overwrite_output_dir", reason, loud=True)
    _resume(rewriting)
    _older_keys(rewriting)


def _loss(rewriting: Rewriting) -> None:
    """Rewrite DFT, a weight on each token's loss; a loss of preference learning is left, and refused."""
    if rewriting.get("loss_type") == "dft":
        rewriting.take("loss_type")
        rewriting.put("loss_weighting", "probability", of="loss_type")
        rewriting.remark("the held-out loss is that of the tokens, without their weights; TRL's has them")


def _attention(rewriting: Rewriting) -> None:
    """Rewrite a kernel of flash attention by another name: all of them compute the same attention."""
    named = rewriting.get("attn_implementation")
    if isinstance(named, str) and named.partition(":")[0].partition("@")[0] in _FLASH_KERNELS:
        rewriting.put("attn_implementation", "auto", of="attn_implementation")


def _model_arguments(rewriting: Rewriting) -> None:
    """Take the keys of model_init_kwargs for keys of the recipe, which they stand above there."""
    block = rewriting.take("model_init_kwargs")
    if block is None:
        return
    known = {"attn_implementation", "dtype", "torch_dtype", "revision", "trust_remote_code", "use_kernels", "use_cache"}
    if not isinstance(block, dict) or set(block) - known:
        name = sorted(set(block) - known)[0] if isinstance(block, dict) else block
        rewriting.refuse(
            "model_init_kwargs", f"model_init_kwargs: '{name}' is not supported yet: arguments of from_pretrained."
        )
        return
    for key, value in block.items():
        rewriting.put("model_revision" if key == "revision" else str(key), value, of="model_init_kwargs")


def _template(rewriting: Rewriting) -> None:
    """Rewrite a template that stands in the recipe or in a file, and the tokens with a role."""
    text, path = rewriting.get("chat_template"), rewriting.take("chat_template_path")
    if text is not None:
        if isinstance(text, str) and "{" in text:
            rewriting.put("chat_template_jinja", text, of="chat_template")
            rewriting.put("chat_template", "jinja", of="chat_template", quiet=True)
        else:
            rewriting.refuse("chat_template", f"chat_template is {text!r:.60}, and not the text of a template.")
    elif isinstance(path, str) and path.endswith((".jinja", ".j2")):
        rewriting.put("chat_template_jinja", path, of="chat_template_path")
        rewriting.put("chat_template", "jinja", of="chat_template_path", quiet=True)
    elif path is not None:
        rewriting.refuse("chat_template_path", _other_tokenizer(path))
    tokens = {key: token for key in ("eos_token", "pad_token") if (token := rewriting.take(key, into="special_tokens"))}
    if tokens:
        rewriting.put("special_tokens", tokens, of=next(iter(tokens)), quiet=True)


def _other_tokenizer(path: Any) -> str:
    """The reason why another tokenizer's template is not taken, and what to write."""
    file = Path(str(path)) / "chat_template.jinja"
    named = f"'{file}'" if file.is_file() else "its chat_template.jinja"
    return (
        f"taking template, end-of-text and added tokens from another tokenizer ('{path}') is not supported yet. Write "
        f"chat_template_path: {named}, and eos_token; name added tokens under `tokens` in the converted recipe."
    )


def _length_and_packing(rewriting: Rewriting) -> None:
    """Rewrite how long rows may be, and what happens to longer ones."""
    for key in ("max_length", "max_seq_length"):
        if key in rewriting.document.values and rewriting.get(key) is None:
            rewriting.refuse(
                key, f"{key} is empty, which in TRL means rows of any length. Write the longest, in tokens."
            )
    strategy = rewriting.take("packing_strategy", "bfd")
    splits = {"bfd": False, "ffd": False, "bfd_split": True, "bfd-requeue": True}
    if not rewriting.get("packing"):
        splits = dict.fromkeys([*splits, "wrapped"], False)
    if not isinstance(strategy, str) or strategy not in splits:
        rewriting.refuse(
            "packing_strategy",
            f"packing_strategy: '{strategy}' is not supported yet: rows that are joined and cut wherever a pack ends. "
            "Write bfd, which keeps rows whole, or bfd_split.",
        )
        return
    rewriting.defaults["excess_length_strategy"] = "split" if splits[strategy] else "truncate"


def _adapter(rewriting: Rewriting) -> None:
    """Rewrite the adapter's keys, which mean nothing without use_peft, and the base's number format."""
    if rewriting.get("use_peft") is not True:
        for key in _LORA_KEYS:
            rewriting.ignore(key, "use_peft is not true, so every weight is trained", loud=True)
        if rewriting.get("load_in_4bit") or rewriting.get("load_in_8bit"):
            key = "load_in_4bit" if rewriting.get("load_in_4bit") else "load_in_8bit"
            rewriting.refuse(key, f"{key} is for a base under an adapter. Write `use_peft: true`, or remove it.")
        rewriting.ignore("use_peft", "every weight is trained")
    else:
        rewriting.take("use_peft")
        rewriting.put("adapter", "qlora" if rewriting.get("load_in_4bit") else "lora", of="use_peft")
    _four_bits(rewriting)


def _four_bits(rewriting: Rewriting) -> None:
    """Rewrite the formats of a 4-bit base, which TRL quantizes once where ours is quantized twice by default."""
    if rewriting.get("adapter") != "qlora":
        for key in _FOUR_BIT_KEYS:
            rewriting.ignore(key, "the base is not in 4 bits")
        return
    block: dict[str, Any] = {"bnb_4bit_use_double_quant": rewriting.take("use_bnb_nested_quant", default=False)}
    for key in ("bnb_4bit_quant_type", "bnb_4bit_quant_storage"):
        value = rewriting.take(key, into="bnb_config_kwargs")
        block |= {key: value} if value is not None else {}
    dtype = rewriting.get("dtype", rewriting.get("torch_dtype", "float32"))
    if dtype in ("float32", "bfloat16", "float16"):
        block["bnb_4bit_compute_dtype"] = dtype
    if "use_bnb_nested_quant" in rewriting.given:
        rewriting.put("bnb_config_kwargs", block, of="use_bnb_nested_quant")
    else:
        rewriting.defaults["bnb_config_kwargs"] = block
    rewriting.remark("TRL keeps the adapter of a 4-bit base in bfloat16; its weights are fp32 here")


def _resume(rewriting: Rewriting) -> None:
    """Refuse a checkpoint of TRL's; true means the newest one, here as there."""
    given = rewriting.get("resume_from_checkpoint")
    if isinstance(given, str):
        rewriting.refuse(
            "resume_from_checkpoint", "a run cannot go on from another tool's checkpoint. Remove it, or write true."
        )


def _older_keys(rewriting: Rewriting) -> None:
    """Say that a recipe of an older TRL is read as one of today's."""
    older = sorted(_OLDER_KEYS & rewriting.given)
    if older:
        rewriting.remark(
            f"{', '.join(older)}: such keys are of an older TRL. What the recipe does not say is as TRL 1.16 does it; "
            "older ones did not recompute activations or compute in bf16 by themselves, and `packing` cut rows where a "
            "pack ends"
        )
