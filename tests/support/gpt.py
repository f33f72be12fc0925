"""Tiny models of our own GPT."""

import torch

from finetuner.models.gpt import GPTConfig, GPTForCausalLM

GPT2 = {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True, "num_key_value_heads": 4}


def make(seed: int = 0, **choices) -> GPTForCausalLM:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | choices
    config = GPTConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, max_position_embeddings=40,
        attn_implementation=shape.pop("attn_implementation", "sdpa"), **shape,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GPTForCausalLM(config)
    with torch.no_grad():  # as after some training: no weight is 0 or 1 exactly
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


IDS = torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(1))
