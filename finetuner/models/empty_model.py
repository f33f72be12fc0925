"""Models without weights: on the meta device, to be counted, or in memory that is not occupied yet, to be filled."""

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from finetuner.models.load import refuses_attention, register_gpt
from finetuner.models.quant_format import QuantFormat
from finetuner.models.quantized_layers import make_room_for_layers, require_full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(
    base_model: "str | PreTrainedConfig",
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    trust_remote_code: bool = False,
    quant_format: QuantFormat | None = None,
) -> "PreTrainedModel":
    """Return the model that load_model would, on the meta device: shapes and dtypes without memory for weights.

    `base_model`: a folder or hub id, of which only config.json is read, or a config. Raises what transformers raises
    for one that it cannot build, and ModelError for a base that is quantized already.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_gpt()
    config: Any = base_model
    if isinstance(base_model, str):
        config = AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
        if quant_format is not None:
            require_full_weights(base_model, config)
    for i, choice in enumerate(attention):
        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=choice, trust_remote_code=trust_remote_code
                )
            break
        except (ValueError, ImportError) as error:
            if not (refuses_attention(error) and i + 1 < len(attention)):
                raise
    if quant_format is not None and quant_format.is_4bit:
        make_room_for_layers(model, quant_format)
    model.tie_weights()
    return model


def meta_model_if_possible(
    base_model: "str | PreTrainedConfig",
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    quant_format: QuantFormat | None,
) -> "PreTrainedModel | None":
    """Return meta_model's model, or None for a base that cannot be built: load_model says why in the user's words."""
    try:
        return meta_model(base_model, dtype=dtype, attention=attention, quant_format=quant_format)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return None


def empty_model(
    base_model: str,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    trust_remote_code: bool = False,
    quant_format: QuantFormat | None = None,
) -> "PreTrainedModel":
    """Return the model that load_model would, on the CPU with arbitrary numbers for weights, to be filled tensor by
    tensor.

    On Linux its memory is not occupied before it is written to, so a rank pays for its shards alone.
    """
    from transformers import GenerationConfig

    model: Any = meta_model(
        base_model, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code, quant_format=quant_format
    )
    num_parameters = sum(1 for _ in model.parameters())
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each module a tensor of its own
    assert sum(1 for _ in model.parameters()) == num_parameters, "a tie was lost"
    with contextlib.suppress(OSError):  # it has none: the config's own values serve
        model.generation_config = GenerationConfig.from_pretrained(base_model)
    return model.eval()


def layers_to_quantize(base_model: str, quant_format: QuantFormat, skip: tuple[str, ...]) -> list[str]:
    """Return the names of the layers of a base that bitsandbytes, as transformers uses it, would quantize; only its
    config is read.

    `skip`: names or expressions of layers that its settings leave out. If they name any, the head is no longer left
    out by itself.
    """
    model = meta_model(base_model, dtype=quant_format.dtype, attention=("sdpa", "eager"))
    return make_room_for_layers(model, replace(quant_format, kind="nf4"), skip or None)
