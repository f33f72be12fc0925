"""Quantized layers in a model: put in while it loads (4 bits, or 8 as in LLM.int8, arXiv:2208.07339), and found."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetuner.errors import ModelError
from finetuner.models.four_bit_linear import FourBitLinear
from finetuner.models.quant_format import QuantFormat, bitsandbytes_config, require_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_full_weights(base_model: str, config: Any) -> None:
    """Raise ModelError for a base that is quantized already: the adapter could not be merged into full weights."""
    if hasattr(config, "quantization_config"):
        raise ModelError(
            f"'{base_model}' is quantized already. Name the full weights: they are quantized as they load."
        )


def quantized_loading_arguments(
    base_model: str, quant_format: QuantFormat, device: torch.device, trust_remote_code: bool
) -> dict[str, Any]:
    """Return arguments for `from_pretrained` to quantize each tensor on `device` as it reads it: memory is the
    quantized model and a few tensors. Embeddings, the head and whatever is tied to them stay as they are.

    Raises ModelError for a base that is quantized already.
    """
    from transformers import AutoConfig

    require_full_weights(base_model, AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code))
    return {"quantization_config": bitsandbytes_config(quant_format), "device_map": {"": device}}


def replace_bitsandbytes_layers(model: "PreTrainedModel", quant_format: QuantFormat) -> None:
    """Replace each 4-bit layer of bitsandbytes in a loaded model by a FourBitLinear with the same bytes.

    Raises ModelError as make_room_for_layers does.
    """
    for name, layer in _bitsandbytes_layers(model).items():
        bias = None if layer.bias is None else layer.bias.data
        state = layer.weight.quant_state
        model.set_submodule(name, FourBitLinear.from_bitsandbytes(layer.weight.data, state, quant_format, bias))
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)  # an ordinary model of ordinary modules is left


def make_room_for_layers(
    model: "PreTrainedModel", quant_format: QuantFormat, skip: tuple[str, ...] | None = None
) -> list[str]:
    """Replace each layer of a model on the meta device that `from_pretrained` would quantize by an empty FourBitLinear;
    return the layers' names.

    `skip`: names or expressions of layers to leave as they are; None: the head, and what is tied. Raises ModelError if
    there is no linear layer to quantize, or one that is not an nn.Linear.
    """
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    stay = get_keys_to_not_convert(model) if skip is None else list(skip)
    replace_with_bnb_linear(model, modules_to_not_convert=stay, quantization_config=bitsandbytes_config(quant_format))
    theirs = _bitsandbytes_layers(model)
    for name, layer in theirs.items():
        model.set_submodule(name, FourBitLinear(layer.in_features, layer.out_features, quant_format, layer.bias))
    return list(theirs)


def _bitsandbytes_layers(model: "PreTrainedModel") -> dict[str, Any]:
    """Name -> 4-bit layer of bitsandbytes. Raises ModelError if there are none, or one that is not a linear layer."""
    bnb = require_bitsandbytes()
    theirs = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if not theirs:
        raise ModelError(f"{type(model).__name__} has no linear layer to quantize to 4 bits. Write `adapter: lora`.")
    for name, layer in theirs.items():
        if layer.source_cls is not nn.Linear:
            raise ModelError(
                f"'{name}' is a {layer.source_cls.__name__}, not a linear layer: {type(model).__name__} cannot be "
                "quantized to 4 bits. Write `adapter: lora`."
            )
    return theirs


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name in the base -> layer in 4 or 8 bits, whether PEFT has wrapped it or not."""
    kinds: tuple[type[nn.Module], ...] = (FourBitLinear,)
    if getattr(model, "is_loaded_in_8bit", False):
        kinds += (require_bitsandbytes().nn.Linear8bitLt,)
    # PEFT moves the layer that it adapts to the name `base_layer` below its own.
    found = ((name.removesuffix(".base_layer"), m) for name, m in model.named_modules() if isinstance(m, kinds))
    return {name: module for name, module in found if isinstance(module, nn.Linear)}
