"""Adapters of every kind, as PEFT writes them."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

KINDS = {
    "plain": {"target_modules": "all-linear"},
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 5},
    },
    "rsLoRA with a pattern": {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.0.*": 7}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "norms whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding and head together": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both whole together": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9]}},
}


def adapt(base: Path, folder: Path, **keys: object):
    """PEFT's model with every weight of the adapter drawn anew, and its adapter in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tied modules is what is tested here
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | keys))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(str(folder))
    return adapted.eval()
