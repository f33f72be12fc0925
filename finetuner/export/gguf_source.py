"""Model folders that can be written as GGUF: Llama, Qwen2 and GPT-2, with a byte-level tokenizer that llama.cpp knows.

What the shapes that are known here cannot say is refused: it would be another model. A GPT of ours that is a Llama in
all but its name is taken as one.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.errors import ModelError
from finetuner.models.files import weight_files
from finetuner.models.gpt_conversion import portable_config
from finetuner.models.load import register_gpt
from finetuner.storage.safetensors_stream import TensorInfo, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pattern by which text is cut before byte-pair encoding -> llama.cpp's name for it.
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}

# model_type of a config -> llama.cpp's architecture.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # the causal mask, in old files of GPT-2
_KNOWN = "llama, qwen2 and gpt2"


@dataclass(frozen=True)
class GGUFSource:
    """A folder that can be written as GGUF. `config`: transformers', of a GPT of ours that of its portable twin."""

    folder: Path
    config: Any
    architecture: str
    tokenizer: "PreTrainedTokenizerBase"
    pre_tokenizer: str  # llama.cpp's name of the way in which text is cut
    tensors: dict[str, tuple[Path, TensorInfo]]


def read_source(folder: Path) -> GGUFSource:
    """Read config, tokenizer and headers of a model folder. Raises ModelError for what would become another model."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("writing GGUF needs the package gguf, which is missing: pip install 'finetuner[gguf]'")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"'{folder}' holds an adapter. Merge it first: python -m finetuner.merge {folder}")
    if not (folder / "config.json").exists():
        raise ModelError(f"'{folder}' is not a model folder: it has no config.json.")
    from transformers import AutoConfig, AutoTokenizer

    register_gpt()
    config: Any = AutoConfig.from_pretrained(folder)
    if config.model_type == "finetuner_gpt":
        config = portable_config(config)  # what has no twin is refused here
        if config.model_type == "gpt2":
            raise ModelError(
                f"'{folder}' is in the middle of its training. The output_dir of its run has it as a GPT-2."
            )
    what = _not_in_gguf(config.to_dict())
    if what is not None:
        raise ModelError(f"'{folder}' has {what}. Convert it with llama.cpp's own convert_hf_to_gguf.py.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tensors = {
        name: (path, info)
        for path in weight_files(folder)
        for name, info in read_header(path).items()
        if not name.endswith(_NOT_WEIGHTS)
    }
    architecture = _ARCHITECTURES[config.model_type]
    return GGUFSource(folder, config, architecture, tokenizer, _pre_tokenizer_name(folder, tokenizer), tensors)


def _not_in_gguf(config: dict[str, Any]) -> str | None:
    """Name what a config asks for that the known shapes cannot say; None if there is nothing."""
    kind, rope = config["model_type"], config.get("rope_parameters") or {}
    found = {
        f"model_type {kind}; {_KNOWN} can be written": kind not in _ARCHITECTURES,
        "biases": config.get("attention_bias") or config.get("mlp_bias"),
        f"positions scaled by {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        "attention in a sliding window": config.get("use_sliding_window"),
        "another activation than GPT-2's": kind == "gpt2" and config["activation_function"] != "gelu_new",
        "attention scaled by the layer": config.get("scale_attn_by_inverse_layer_idx"),
        "attention that is not scaled": not config.get("scale_attn_weights", True),
    }
    return next((what for what, is_so in found.items() if is_so), None)


def _pre_tokenizer_name(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return llama.cpp's name for the way in which the tokenizer cuts text.

    Raises ModelError for one that it does not have, or that is not known here: text would become other tokens than
    those the model was trained on."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text()) if file.exists() else {"model": {}}
    name = _byte_level_name(settings) if settings["model"].get("type") == "BPE" else None
    if name is None:
        raise ModelError(
            f"the tokenizer of '{folder}' ({type(tokenizer).__name__}) cuts text in a way that is not known to be one "
            "of llama.cpp's. Convert it with llama.cpp's own convert_hf_to_gguf.py."
        )
    return name


def _byte_level_name(settings: dict[str, Any]) -> str | None:
    """Name a byte-level tokenizer by its steps before the merges; None for steps that are not known."""
    steps = settings.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    *before, last = steps
    if last.get("type") != "ByteLevel":
        return None
    normalizer, kinds = settings.get("normalizer"), [step.get("type") for step in before]
    if last.get("use_regex", True):  # cuts words itself
        if normalizer is not None or kinds not in ([], ["Digits"]):
            return None
        return "gpt-2" if not before else "smollm" if before[0]["individual_digits"] else None
    name = SPLITS.get(before[0].get("pattern", {}).get("Regex") or "") if kinds == ["Split"] else None
    # llama.cpp composes no characters before it cuts, as Qwen's tokenizer does: nearly all text is composed already
    composes = name == "qwen2" and normalizer == {"type": "NFC"}
    return name if normalizer is None or composes else None
