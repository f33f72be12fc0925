"""quantization.json in an adapter's folder: the modules of the base that were quantized while it was trained, and how.

A merge needs it: the adapter corrects the quantized weights, and not the full ones.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuner.errors import CheckpointError, ModelError
from finetuner.models.four_bit_linear import FourBitLinear
from finetuner.models.quant_format import QuantFormat, dtype_named, name_of_dtype, require_bitsandbytes
from finetuner.models.quantized_layers import quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "quantization.json"


@dataclass(frozen=True)
class QuantRecord:
    """The format and the names of the quantized modules; `dtype` and `compute_dtype` are names of torch dtypes."""

    kind: str
    double: bool
    dtype: str
    compute_dtype: str
    modules: tuple[str, ...]

    @property
    def format(self) -> QuantFormat:
        return QuantFormat(self.kind, dtype_named(self.dtype), self.double, dtype_named(self.compute_dtype))


def record_of(model: "PreTrainedModel") -> QuantRecord | None:
    """Return the record of a loaded base, or None if nothing in it is quantized."""
    layers = quantized_layers(model)
    if not layers:
        return None
    first = next(iter(layers.values()))
    if isinstance(first, FourBitLinear):
        found = first.quant_format
    else:
        found = QuantFormat("int8", model.dtype, compute_dtype=model.dtype)
    dtype, compute_dtype = name_of_dtype(found.dtype), name_of_dtype(found.compute_dtype)
    return QuantRecord(found.kind, found.double, dtype, compute_dtype, tuple(layers))


def write_record(record: QuantRecord, folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")


def read_record(folder: Path) -> QuantRecord | None:
    """Return the record in an adapter's folder, or None if there is none: the base was not quantized.

    Raises ModelError for a damaged file."""
    try:
        text = (folder / RECORD).read_text()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
        return QuantRecord(**values | {"modules": tuple(values["modules"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{folder / RECORD}' cannot be read ({error}). Fetch the adapter again.") from error


def require_same_record(folder: Path, record: QuantRecord | None) -> None:
    """Raise CheckpointError unless the adapter in a checkpoint's folder was trained on a base quantized in this way."""
    saved = read_record(folder)
    if saved != record:
        raise CheckpointError(
            f"the base of the checkpoint {folder} was loaded as {_described(saved)}, and is {_described(record)} now.\n"
            "Set load_in_4bit, load_in_8bit, bnb_config_kwargs and bf16 back, or start again with another output_dir."
        )


def quantization_round_trip(weight: torch.Tensor, record: QuantRecord) -> torch.Tensor:
    """Quantize `weight`, (out, in), and dequantize it: the weight as the products of the training run saw it, fp32.

    Bit for bit on the kind of device that the run quantized on; kernels of another kind may take the other one of two
    levels that are equally near.
    """
    quant_format = record.format
    weight = weight.to(quant_format.dtype)
    if quant_format.is_4bit:
        weight = FourBitLinear.quantize(weight, quant_format).dequantize()
    else:
        functional = require_bitsandbytes().functional
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        weight = functional.int8_vectorwise_dequant(codes, scales)
    return weight.to(quant_format.compute_dtype).float()


def _described(record: QuantRecord | None) -> str:
    if record is None:
        return "full weights"
    return f"{record.format} of {record.dtype} ({len(record.modules)} modules)"
