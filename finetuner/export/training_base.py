"""How the base was kept while an adapter was trained: as our record says, or as other tools' settings do.

Without our record, bitsandbytes' rules in transformers decide which modules were quantised: every linear layer but the
head, and what is tied to the embedding. The settings are those of a config.json that a tool left beside the adapter, or
of the quantised base that the adapter names.
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
from finetuner.storage.safetensors_stream import DTYPES, read_header

KINDS = ("nf4", "fp4")


def record_for(adapter: Path, base: Path, wanted: bool | None) -> QuantRecord | None:
    """`wanted`: onto the quantised base, or not; None: as training saw it, as far as that is known.

    Raises ModelError for settings that cannot be followed."""
    if wanted is False:
        return None
    record = read_record(adapter)
    settings = None if record is not None else known_settings(adapter)
    if record is None and settings is None and not wanted:
        return None
    require_bitsandbytes()
    return record or _by_their_rules(base, settings or {})


def quantised_tensors(record: QuantRecord | None, base_names: set[str]) -> dict[str, QuantRecord]:
    """Base tensor -> how it was kept, for those that were quantised."""
    if record is None:
        return {}
    return {base_name(f"{module}.weight", f"{module} of {RECORD}", base_names): record for module in record.modules}


def known_settings(adapter: Path) -> dict[str, Any] | None:
    """The quantization_config that is beside the adapter, or that of the base it names; None if there is none."""
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


def _by_their_rules(base: Path, settings: dict[str, Any]) -> QuantRecord:
    eight = bool(settings.get("load_in_8bit"))
    kind = "int8" if eight else settings.get("bnb_4bit_quant_type", "nf4")
    method, block = settings.get("quant_method", "bitsandbytes"), settings.get("bnb_4bit_blocksize", BLOCK_SIZE)
    if "bitsandbytes" not in str(method) or kind not in (*KINDS, "int8") or block != BLOCK_SIZE:
        what = f"{method}, {kind}, blocks of {block}"
        raise ModelError(
            f"the adapter was trained on a base quantised by {what}; bitsandbytes' nf4, fp4 (blocks of {BLOCK_SIZE}) "
            "and int8 can be followed.\nMerge onto the full weights as they are: base=original"
        )
    dtype = _number_format(base)
    compute = settings.get("bnb_4bit_compute_dtype", dtype) if not eight else dtype
    double = bool(settings.get("bnb_4bit_use_double_quant", not settings)) and not eight
    record = QuantRecord(kind, double, dtype, compute, ())
    skip = tuple(settings.get("llm_int8_skip_modules") or ())
    return replace(record, modules=tuple(layers_to_quantize(str(base), record.format, skip)))


def _number_format(base: Path) -> str:
    """That of the weights: they were quantised from it."""
    kinds = [DTYPES[info.dtype] for path in weight_files(base) for info in read_header(path).values()]
    floats = [kind for kind in kinds if kind in (torch.float32, torch.float16, torch.bfloat16)]
    most = max(set(floats), key=floats.count, default=torch.bfloat16)
    return str(most).removeprefix("torch.")
