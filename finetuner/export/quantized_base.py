"""Quantization of a base while an adapter was trained on it: by our record, or by other tools' settings.

Without our record, bitsandbytes' rules in transformers decide which modules were quantized: every linear layer but the
head, and what is tied to the embedding. The settings are those of a config.json that a tool left next to the adapter,
or of the quantized base that the adapter names.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetuner.errors import ModelError
from finetuner.export.adapter_updates import base_name
from finetuner.models.adapter_folder import read_config
from finetuner.models.empty_model import layers_to_quantize
from finetuner.models.files import weight_files
from finetuner.models.four_bit_linear import BLOCK_SIZE
from finetuner.models.quant_format import require_bitsandbytes
from finetuner.models.quant_record import RECORD, QuantRecord, read_record
from finetuner.storage.safetensors_stream import SAFETENSORS_DTYPES, read_header

FOUR_BIT_KINDS = ("nf4", "fp4")


def quantization_in_training(adapter: Path, base: Path, dequantize: bool | None) -> QuantRecord | None:
    """Return how the base was quantized while the adapter was trained, or None if it is merged onto the base as it is.

    `dequantize`: merge onto the quantized base, or not; None: as training saw it, as far as that is known.
    Raises ModelError for settings that cannot be followed."""
    if dequantize is False:
        return None
    record = read_record(adapter)
    settings = None if record is not None else quantization_settings(adapter)
    if record is None and settings is None and not dequantize:
        return None
    require_bitsandbytes()
    return record or _record_by_bitsandbytes_rules(base, settings or {})


def quantized_tensors(record: QuantRecord | None, base_names: set[str]) -> dict[str, QuantRecord]:
    """Map the base's tensors that were quantized to how they were."""
    if record is None:
        return {}
    return {base_name(f"{module}.weight", f"{module} of {RECORD}", base_names): record for module in record.modules}


def quantization_settings(adapter: Path) -> dict[str, Any] | None:
    """Read the quantization_config next to the adapter, or that of the base it names; None if there is none."""
    named = read_config(adapter).get("base_model_name_or_path")
    folders = [adapter, *([Path(named)] if named else [])]
    for folder in folders:
        try:
            found = json.loads((folder / "config.json").read_text()).get("quantization_config")
        except (OSError, ValueError, AttributeError):  # no folder of this disk, or nothing that says how
            continue
        if isinstance(found, dict):
            return found
    return None


def _record_by_bitsandbytes_rules(base: Path, settings: dict[str, Any]) -> QuantRecord:
    eight = bool(settings.get("load_in_8bit"))
    kind = "int8" if eight else settings.get("bnb_4bit_quant_type", "nf4")
    method, block = settings.get("quant_method", "bitsandbytes"), settings.get("bnb_4bit_blocksize", BLOCK_SIZE)
    if "bitsandbytes" not in str(method) or kind not in (*FOUR_BIT_KINDS, "int8") or block != BLOCK_SIZE:
        what = f"{method}, {kind}, blocks of {block}"
        raise ModelError(
            f"the adapter was trained on a base quantized by {what}; bitsandbytes' nf4, fp4 (blocks of {BLOCK_SIZE}) "
            "and int8 can be followed.\nMerge onto the full weights as they are: base=original"
        )
    dtype = _number_format(base)
    compute = settings.get("bnb_4bit_compute_dtype", dtype) if not eight else dtype
    double = bool(settings.get("bnb_4bit_use_double_quant", not settings)) and not eight
    record = QuantRecord(kind, double, dtype, compute, ())
    skip = tuple(settings.get("llm_int8_skip_modules") or ())
    return replace(record, modules=tuple(layers_to_quantize(str(base), record.format, skip)))


def _number_format(base: Path) -> str:
    """Number format of most of the base's weights, from which they were quantized."""
    kinds = [SAFETENSORS_DTYPES[info.dtype] for path in weight_files(base) for info in read_header(path).values()]
    floats = [kind for kind in kinds if kind in (torch.float32, torch.float16, torch.bfloat16)]
    most = max(set(floats), key=floats.count, default=torch.bfloat16)
    return str(most).removeprefix("torch.")
