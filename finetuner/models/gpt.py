"""A GPT, from the ids of tokens to the logits of the next one, in one file to be read from top to bottom.

Written for reading first, but complete: `generate` with its key-value cache, `save_pretrained`, PEFT, FSDP2 and ZeRO
work on it as on any model of transformers. `python -m finetuner.models.gpt` builds a small one and lists its tensors.

Letters in shapes: B rows, T tokens in a row, D the width, H heads, K key-value heads, C = D / H the width of a head,
V the vocabulary. Names of modules are those of transformers' Llama, so that a checkpoint is one of Llama's where the
choices agree (models/gpt_conversion.py).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class GPTConfig(PreTrainedConfig):
    """The shape of a GPT. The defaults are those of Llama-like models; the other choices are GPT-2's.

    norm: rms | layer. activation: swiglu | gelu. positions: rotary | learned. bias: in every linear layer but the head.
    """

    model_type = "finetuner_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own convention)

    vocab_size: int = 50_304
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    max_position_embeddings: int = 1024
    norm: str = "rms"
    activation: str = "swiglu"
    positions: str = "rotary"
    bias: bool = False
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w over the width (arXiv:1910.07467): LayerNorm without the mean and the bias.

    The mean of squares is taken in fp32: in bf16 a sum over thousands of squares loses its small terms.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        in_fp32 = x.float()
        in_fp32 = in_fp32 * torch.rsqrt(in_fp32.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * in_fp32.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn every pair by a quarter: (x1, x2) -> (-x2, x1), the halves of the last axis of x, (..., C).

    [1, 2, 3, 4] -> [-3, -4, 1, 2]. Pair i is (x[i], x[i + C/2]).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary_angles(positions: torch.Tensor, head_width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of (position * theta^(-2i/C)) for every pair i, repeated for both halves of the last axis.

    positions: (B, T). Returns (B, T, C) each, fp32. Slow pairs (large i) tell far tokens apart, fast ones near tokens
    (RoPE, arXiv:2104.09864, section 3.2.2).
    """
    pairs = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * (1.0 / theta ** (pairs / head_width))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn every pair of x, (B, heads, T, C), by the angle of its position: cos and sin, (B, T, C).

    A turn by a and one by b leave the product of query and key depending on a - b alone: on how far apart the two are.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return x * cos + rotate_half(x) * sin


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(Q K^T / sqrt(C) + mask) V, as it is written (arXiv:1706.03762, section 3.2.1).

    query: (B, H, T, C); key, value: (B, K, S, C), each shared by H / K heads of the query (grouped-query attention,
    arXiv:2305.13245). attention_mask: (B, 1, T, S), 0 where a token may look and -inf (or False) elsewhere.
    Returns (B, T, H, C) and the weights (B, H, T, S). The (T, S) weights are in memory here; the other implementations
    never store them.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        visible = attention_mask[..., : key.shape[2]]
        scores = scores.masked_fill(~visible, -math.inf) if visible.dtype == torch.bool else scores + visible
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def residual_output(layer: nn.Linear) -> nn.Linear:
    """Mark a layer that writes to the residual stream, for GPTPreTrainedModel._init_weights; return it."""
    layer.is_residual_output = True  # type: ignore[assignment]
    return layer


class Attention(nn.Module):
    """Every token gathers from those before it: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.head_width = config, layer, config.head_dim
        self.scaling = self.head_width**-0.5
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        wide, narrow = config.num_attention_heads * self.head_width, config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.bias)
        self.o_proj = residual_output(nn.Linear(wide, config.hidden_size, bias=config.bias))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache | None,
        **flash: Any,
    ) -> torch.Tensor:
        """x: (B, T, D); mask: (B, 1, T, S), or None where the attention itself looks back only; angles: cos and sin,
        (B, T, C); flash: further arguments of flash attention. Returns (B, T, D)."""
        rows, length, _ = x.shape
        # (B, T, heads * C) -> (B, heads, T, C)
        query, key, value = (
            project(x).view(rows, length, -1, self.head_width).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:  # keys and values of the tokens before these
            key, value = cache.update(key, value, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        dropout = self.config.dropout if self.training else 0.0
        gathered, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **flash)
        return self.o_proj(gathered.reshape(rows, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one projection decides how much of the other passes (arXiv:2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = residual_output(nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELU(nn.Module):
    """down(gelu(up(x))), with the tanh approximation that GPT-2 was trained with (arXiv:1606.08415)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = residual_output(nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


def make_norm(config: GPTConfig) -> nn.Module:
    """Return a normalization over the width, of the kind that the config names."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.bias)


class Block(GradientCheckpointingLayer):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)). The sum runs through, and both add to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp: nn.Module = SwiGLU(config) if config.activation == "swiglu" else GELU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, *context: Any, **flash: Any) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); context and flash: the further arguments of Attention.forward."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), *context, **flash))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class GPTPreTrainedModel(PreTrainedModel):
    """Facts that transformers asks a model class for, and the initial weights."""

    config: GPTConfig
    config_class = GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' own convention)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw from a normal with a standard deviation of 0.02, and of 0.02 / sqrt(2 layers) for what adds to the
        running sum.

        The sum over 2 x layers such terms then has the variance of one (GPT-2's report, section 2.3).
        """
        std = self.config.initializer_range  # transformers' functions pass over weights that were read from a file
        if isinstance(module, nn.Linear | nn.Embedding):
            depth = 2 * self.config.num_hidden_layers if getattr(module, "is_residual_output", False) else 1
            initialization.normal_(module.weight, 0.0, std / math.sqrt(depth))
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            initialization.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            initialization.zeros_(bias)


class GPTModel(GPTPreTrainedModel):
    """Ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **flash: Any,
    ) -> BaseModelOutputWithPast:
        """Ids (B, T), or embeddings (B, T, D), -> hidden states (B, T, D).

        attention_mask: (B, T), 0 at padding. position_ids: (B, T); where they return to 0, a new document begins that
        sees nothing of the one before."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + cached)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = None
        if self.config.positions == "learned":
            x = x + self.embed_positions(position_ids)
        else:
            angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        x = self.dropout(x)
        for block in self.layers:
            x = block(x, mask, angles, past_key_values, position_ids=position_ids, **flash)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """Ids (B, T) -> logits (B, T, V) of the token after each."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **flash: Any,
    ) -> CausalLMOutputWithPast:
        """Ids (B, T) -> logits (B, T, V), or (B, logits_to_keep, V) of the last positions alone.

        labels: (B, T), the ids themselves, -100 where nothing is trained on; shifted here, so that position t is
        trained on token t + 1. The loss is the mean over the labels that are trained on."""
        found = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **flash
        )
        x = found.last_hidden_state
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(x if isinstance(last, int) else x[:, last])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)


AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM, exist_ok=True)


def main() -> None:
    """Build a small GPT, and print its tensors and the loss before any training."""
    config = GPTConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        print(f"{name:<48} {tuple(parameter.shape)!s:<12} {parameter.numel():>8,}")
    print(f"{'in all':<61} {model.num_parameters():>8,}")
    ids = torch.randint(config.vocab_size, (4, 64))
    loss = model(ids, labels=ids).loss
    print(f"loss before any training {loss.item():.3f}; guessing blindly costs ln(256) = {math.log(256):.3f}")


if __name__ == "__main__":
    main()
