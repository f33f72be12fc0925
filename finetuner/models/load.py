"""Hugging Face causal language models, loaded with all their weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from finetuner.errors import ModelError
from finetuner.models.quant_format import QuantFormat
from finetuner.models.quantized_layers import quantized_loading_arguments, replace_bitsandbytes_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    base_model: str,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    trust_remote_code: bool = False,
    quant_format: QuantFormat | None = None,
    device: torch.device | None = None,
) -> "PreTrainedModel":
    """Return a causal LM with its weights in `dtype`, on the CPU, with the first `attention` that the architecture has.

    With a `quant_format`, its linear layers but the head are quantized to it, on `device`, while they are read.

    Only safetensors: pickled weights can run code. Raises ModelError unless every weight of the model is in the files;
    transformers fills up what is missing with random numbers.
    """
    from transformers import AutoModelForCausalLM

    register_gpt()
    quantize_on = device or torch.device("cpu")
    for i, choice in enumerate(attention):
        try:
            quantization = (
                quantized_loading_arguments(base_model, quant_format, quantize_on, trust_remote_code)
                if quant_format is not None
                else {}
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base_model,
                dtype=dtype,
                attn_implementation=choice,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **quantization,
            )
            break
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if not (refuses_attention(error) and i + 1 < len(attention)):
                raise _cannot_load(base_model, error) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of '{base_model}' are not those of its config ({type(model).__name__}): '{missing[0]}' and "
            f"{len(missing) - 1} more tensors are missing.\nFetch the model again, or fix its config.json."
        )
    if quant_format is not None and quant_format.is_4bit:
        replace_bitsandbytes_layers(model, quant_format)
    return model


def refuses_attention(error: Exception) -> bool:
    """Return whether transformers raised this because the architecture lacks the attention that was asked for."""
    return isinstance(error, ValueError | ImportError) and "attention" in str(error).lower()


def _cannot_load(base_model: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    pickled = list(Path(base_model).glob("pytorch_model*.bin")) if Path(base_model).is_dir() else []
    advice = "Its weights are pickled: if you know who made them, write `pickled_weights: true`." if pickled else ""
    return ModelError(
        f"cannot load a causal language model from '{base_model}': {first}\n"
        f"{advice or 'Give a folder with config.json and model.safetensors, or a hub id (and a network).'}"
    )


def register_gpt() -> None:
    """Let transformers' Auto classes read a GPT of ours: its module registers it when it is imported."""
    from finetuner.models import gpt

    assert gpt.GPTConfig.model_type
