"""Rules about overrides_of_model_config: keys that belong to others of the recipe, or that nothing reads."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.problems import KeyPath
from finetuner.recipe.rules.base import Finding, Rule, Values

_KEY = "overrides_of_model_config"
_CLASS = "the base's own config names its class. Remove it"
_ELSEWHERE = {
    "torch_dtype": "write bf16 or fp16", "dtype": "write bf16 or fp16",
    "attn_implementation": "write attn_implementation as a key of the recipe",
    "_attn_implementation": "write attn_implementation as a key of the recipe",
    "quantization_config": "write `adapter: qlora`",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "write the token itself under special_tokens"),
    **dict.fromkeys(("architectures", "model_type", "auto_map", "transformers_version", "is_encoder_decoder"), _CLASS),
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type"),
        "training reads no such value. Remove it"),
}  # fmt: skip
_OF_EXPERTS = ("output_router_logits", "router_aux_loss_coef", "router_z_loss_coef")


def _keys_of_the_model_alone(values: Values) -> Iterator[Finding]:
    overrides = values[_KEY]
    if overrides and values["base_model"] == FROM_SCRATCH:
        yield Finding(
            (_KEY,), f"{_KEY} changes a base's config, and this model is from scratch: write it under `model`."
        )
        return
    yield from _judge((_KEY,), overrides)


def _judge(where: KeyPath, block: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in block.items():
        if key in _ELSEWHERE:
            yield Finding((*where, key), f"{key} is not taken from here: {_ELSEWHERE[key]}.")
        elif key in _OF_EXPERTS and value:
            message = "is not supported yet: the loss of a router, which comes with mixtures of experts. Remove it."
            yield Finding((*where, key), f"{_KEY}: '{key}' {message}")
        elif isinstance(value, dict) and not key.startswith("rope"):
            yield from _judge((*where, key), value)


RULES: tuple[Rule, ...] = (((_KEY, "base_model"), _keys_of_the_model_alone),)
