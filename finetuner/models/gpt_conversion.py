"""A GPT of ours converted to the same model as transformers' Llama or GPT-2, which load without any code of ours.

Other tools (vLLM, llama.cpp and their like) know these two. Weights are renamed and transposed, never computed with, so
the logits are the same.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from finetuner.models.gpt import GPTConfig

# Ours -> GPT-2's, within a layer. GPT-2 stores its matrices as (in, out).
_IN_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_IN_GPT2 = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}


def is_portable(config: "GPTConfig") -> bool:
    """Return whether the config is exactly a Llama or a GPT-2."""
    try:
        portable_config(config)
    except ModelError:
        return False
    return True


def portable_config(config: "GPTConfig") -> "PreTrainedConfig":
    """Return the config of the same model in transformers.

    Raises ModelError where the choices are neither Llama's nor GPT-2's.
    """
    from transformers import GPT2Config, LlamaConfig

    token_ids: dict[str, Any] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if (config.norm, config.activation, config.positions, config.bias) == ("rms", "swiglu", "rotary", False):
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            initializer_range=config.initializer_range,
            tie_word_embeddings=config.tie_word_embeddings,
            architectures=["LlamaForCausalLM"],
            **token_ids,
        )
    choices = (config.norm, config.activation, config.positions, config.bias)
    if choices == ("layer", "gelu", "learned", True) and config.num_key_value_heads == config.num_attention_heads:
        return GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=config.intermediate_size,
            layer_norm_epsilon=config.norm_epsilon,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            initializer_range=config.initializer_range,
            tie_word_embeddings=config.tie_word_embeddings,
            architectures=["GPT2LMHeadModel"],
            **token_ids,
        )
    raise ModelError(
        f"a model with norm {config.norm}, activation {config.activation}, positions {config.positions} and bias "
        f"{str(config.bias).lower()} has no counterpart in other tools.\n"
        "Llama has rms, swiglu, rotary, false; GPT-2 has layer, gelu, learned, true, and as many key-value heads."
    )


def portable_weights(config: "GPTConfig", weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names and in the layout of portable_config's model.

    Matrices, (out, in), are transposed for GPT-2, and query, key and value joined to one of (in, 3 out).
    """
    if portable_config(config).model_type == "llama":
        return dict(weights)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name in _IN_GPT2:
            renamed[_IN_GPT2[name]] = tensor
            continue
        _, _, layer, *path, kind = name.split(".")  # model.layers.0.self_attn.q_proj.weight
        module = ".".join(path)
        if module in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        laid_out = tensor
        if module == "self_attn.q_proj":  # one matrix gives query, key and value there
            matrices = [weights[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            module, laid_out = "", torch.cat(matrices)
        target = _IN_GPT2_LAYER.get(module, "attn.c_attn")
        if laid_out.ndim == 2:
            laid_out = laid_out.t()
        renamed[f"transformer.h.{layer}.{target}.{kind}"] = laid_out.contiguous()
    return renamed
