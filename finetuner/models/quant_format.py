"""The number format of a quantized base model, and how bitsandbytes and transformers are told about it."""

from dataclasses import dataclass
from typing import Any

import torch

from finetuner.errors import ModelError
from finetuner.recipe.sections import QuantizationSection


@dataclass(frozen=True)
class QuantFormat:
    """Number format of one quantized weight matrix.

    `kind`: nf4, fp4 or int8. `dtype`: the format of the full weights before. `double`: whether the scales are quantized
    too. `compute_dtype`: the format of the products. `storage`: the dtype under which the packed bytes are stored, for
    engines that gather tensors of one dtype only.
    """

    kind: str
    dtype: torch.dtype
    double: bool = False
    compute_dtype: torch.dtype = torch.float32
    storage: torch.dtype = torch.uint8

    @property
    def is_4bit(self) -> bool:
        return self.kind != "int8"

    def __str__(self) -> str:
        bits = f"4-bit {self.kind}" if self.is_4bit else "8-bit"
        return bits + (", double quantized" if self.double else "")


def choose_quant_format(adapter: str | None, section: QuantizationSection, dtype: torch.dtype) -> QuantFormat | None:
    """Return the format of the base in a run whose full weights are `dtype`, or None if it is not quantized.

    `adapter`: the recipe's key: "qlora" has a 4-bit base.
    """
    if section.load_in_8bit:
        return QuantFormat("int8", dtype, compute_dtype=dtype)
    if adapter != "qlora" and not section.load_in_4bit:
        return None
    four = section.bnb_config_kwargs
    return QuantFormat(
        kind=four.bnb_4bit_quant_type,
        dtype=dtype,
        double=four.bnb_4bit_use_double_quant,
        compute_dtype=dtype_named(four.bnb_4bit_compute_dtype) if four.bnb_4bit_compute_dtype else dtype,
        storage=dtype_named(four.bnb_4bit_quant_storage),
    )


def require_bitsandbytes() -> Any:
    """Return the imported library. Raises ModelError that names the command to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError("a 4-bit or 8-bit base needs bitsandbytes: pip install 'finetuner[quantize]'.") from error
    return bitsandbytes


def bitsandbytes_config(quant_format: QuantFormat) -> Any:
    """Return transformers' BitsAndBytesConfig for this format. Raises ModelError without bitsandbytes."""
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if not quant_format.is_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_format.kind,
        bnb_4bit_use_double_quant=quant_format.double,
        bnb_4bit_compute_dtype=quant_format.compute_dtype,
    )


def dtype_named(name: str) -> torch.dtype:
    """Return torch.bfloat16 for "bfloat16", and so on."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")
