"""A model folder of the Llama, Qwen2 or GPT-2 shape as one GGUF file, tensor by tensor, for llama.cpp and what is built
on it.

Of a Llama, GGUF keeps the two halves of a rotated pair side by side where transformers keeps them half a head apart:
rows of the query and key projections change places. GPT-2's matrices are turned: transformers keeps them (in, out).
Norms, biases and learned positions stay in fp32, as llama.cpp's kernels want them. A GPT of ours that is a Llama in
all but its name is written as one.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetuner.errors import ModelError
from finetuner.export.verify_logits import Agreement, agreement_of, prompt_rows
from finetuner.models.files import weight_files
from finetuner.models.gguf_import import import_gguf
from finetuner.models.gpt_conversion import portable_config
from finetuner.models.load import load_model, register_gpt
from finetuner.models.stop_tokens import stop_token_ids
from finetuner.storage.safetensors_stream import TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("f16", "q8_0")
# Mean KL divergence in nats a token. q8_0 rounds each weight to one of 255 steps of its block of 32.
BOUNDS = {"f16": 1e-4, "q8_0": 1e-2}
BLOCK = 32
PROBE = "Naïve  text,\n\twith 2  numbers: 10, 2026!"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before byte-pair encoding -> llama.cpp's name for it.
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


# model_type of a config -> llama.cpp's architecture.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
_TURNED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # the causal mask, in old files of GPT-2
_KNOWN = "llama, qwen2 and gpt2"
# Where transformers' reader of an architecture cuts text as the file says.
_READ_AS_WRITTEN = {("llama", "gpt-2"), ("llama", "smollm"), ("qwen2", "qwen2"), ("gpt2", "gpt-2")}


@dataclass(frozen=True)
class Source:
    """A folder that can be written as GGUF. `config`: transformers', of a GPT of ours that of its portable twin."""

    folder: Path
    config: Any
    architecture: str
    tokenizer: "PreTrainedTokenizerBase"
    pre: str  # llama.cpp's name of the way in which text is cut
    tensors: dict[str, tuple[Path, TensorInfo]]


def read_source(folder: Path) -> Source:
    """Raises ModelError for what the shapes that are known here cannot say: it would be another model."""
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
    rope = getattr(config, "rope_parameters", None) or {}
    for wrong, what in (
        (config.model_type not in _ARCHITECTURES, f"model_type {config.model_type}; {_KNOWN} can be written"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "biases"),
        (rope.get("rope_type", "default") != "default", f"positions scaled by {rope.get('rope_type')}"),
        (getattr(config, "use_sliding_window", False), "attention in a sliding window"),
        (config.model_type == "gpt2" and config.activation_function != "gelu_new", "another activation than GPT-2's"),
        (getattr(config, "scale_attn_by_inverse_layer_idx", False), "attention scaled by the layer"),
        (not getattr(config, "scale_attn_weights", True), "attention that is not scaled"),
    ):
        if wrong:
            raise ModelError(f"'{folder}' has {what}. Convert it with llama.cpp's own convert_hf_to_gguf.py.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tensors = {
        name: (path, info)
        for path in weight_files(folder)
        for name, info in read_header(path).items()
        if not name.endswith(_NOT_WEIGHTS)
    }
    architecture = _ARCHITECTURES[config.model_type]
    return Source(folder, config, architecture, tokenizer, _way_of_cutting(folder, tokenizer), tensors)


def export_gguf(folder: Path, output: Path, form: str, report: Callable[[int, int], None]) -> Agreement:
    """Write the file `output`, read it back, and compare. Raises ModelError, and leaves no file, if it is not the
    same model within the rounding of `form` (f16 or q8_0)."""
    if form not in FORMATS:
        raise ModelError(f"'{form}' is not a form that can be written. Write one of {', '.join(FORMATS)}.")
    if output.exists():
        raise ModelError(f"{output} exists. Name another file, or delete it: rm {output}")
    source = read_source(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.partial.gguf")
    part.unlink(missing_ok=True)
    try:
        _write(source, part, form, report)
        agreement = _read_back(source, part, form)
        part.rename(output)
    finally:
        part.unlink(missing_ok=True)
    return agreement


def _write(source: Source, file: Path, form: str, report: Callable[[int, int], None]) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, source.architecture)
    _describe(writer, source, form)
    layers = source.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[source.architecture.upper()], layers)
    total, done = 0, 0
    planned: list[tuple[str, Any]] = []
    for name, (_, info) in source.tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        shape = info.shape[::-1] if _is_turned(source, name) else info.shape
        if theirs is None:
            raise ModelError(f"the tensor '{name}' of '{source.folder}' has no place in GGUF's {source.architecture}.")
        kind = _kind(name, shape, form)
        block, itemsize = gguf.GGML_QUANT_SIZES[kind]
        count = int(torch.Size(shape).numel())
        num_bytes = count // block * itemsize
        if block == 1:
            kept = np.dtype(np.float32 if kind.name == "F32" else np.float16)
            writer.add_tensor_info(theirs, shape, kept, num_bytes)
        else:
            in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(theirs, in_bytes, np.dtype("uint8"), num_bytes, raw_dtype=kind)
        planned.append((name, kind))
        total += num_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in planned:
        data = gguf.quants.quantize(_laid_out(source, name), kind)
        if kind.name == "F16" and data.size and not bool((abs(data) <= 65504).all()):
            raise ModelError(f"'{name}' has values beyond 65504, the largest of f16. Write q8_0.")
        writer.write_tensor_data(data)
        done += data.nbytes
        report(done, total)
    writer.close()


def _is_turned(source: Source, name: str) -> bool:
    return source.architecture == "gpt2" and name.endswith(_TURNED)


def _kind(name: str, shape: tuple[int, ...], form: str) -> Any:
    import gguf

    if len(shape) == 1 or name.endswith("wpe.weight"):
        return gguf.GGMLQuantizationType.F32
    whole_blocks = shape[-1] % BLOCK == 0
    return gguf.GGMLQuantizationType.Q8_0 if form == "q8_0" and whole_blocks else gguf.GGMLQuantizationType.F16


def _laid_out(source: Source, name: str) -> Any:
    """fp32, as numpy; queries and keys with the halves of each rotated pair side by side."""
    path, info = source.tensors[name]
    weight = read_tensor(path, info).float()
    config = source.config
    if _is_turned(source, name):
        weight = weight.t()
    if source.architecture != "llama":
        return weight.contiguous().numpy()
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if name.endswith(f".{part}.weight"):
            weight = weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def _describe(writer: Any, source: Source, form: str) -> None:
    """Sizes and the tokenizer."""
    import gguf

    config, tokenizer = source.config, source.tokenizer
    writer.add_name(source.folder.resolve().name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if source.architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    kinds = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(kinds[form])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(source.pre)
    by_id = {one: token for token, one in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for one in range(config.vocab_size):
        tokens.append(by_id.get(one, f"[PAD{one}]"))  # a table may have more rows than there are tokens
        if one not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif one in added:
            types.append(gguf.TokenType.CONTROL if added[one].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(_merges(source.folder)))
    for role in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{role}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    stops = stop_token_ids(tokenizer)
    if len(stops) > 1:
        writer.add_eot_token_id(stops[-1])
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _merges(folder: Path) -> Iterator[str]:
    for merge in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]:
        yield merge if isinstance(merge, str) else " ".join(merge)


def _way_of_cutting(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """llama.cpp's name for it. Raises ModelError for one that it does not have, or that is not known here: text would
    become other tokens than those the model was trained on."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text()) if file.exists() else {"model": {}}
    steps = settings.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    normalises = settings.get("normalizer") is not None
    if settings["model"].get("type") == "BPE" and kinds[-1] == "ByteLevel":
        before = steps[:-1]
        if not normalises and not before and steps[-1].get("use_regex", True):
            return "gpt-2"
        if (
            not normalises
            and kinds[:-1] == ["Digits"]
            and before[0]["individual_digits"]
            and steps[-1].get("use_regex", True)
        ):
            return "smollm"
        pattern = before[0].get("pattern", {}).get("Regex") if kinds[:-1] == ["Split"] else None
        name = SPLITS.get(pattern or "")
        # llama.cpp composes no characters before it cuts, as Qwen's tokenizer does: nearly all text is composed already
        composes = name == "qwen2" and settings.get("normalizer") == {"type": "NFC"}
        if name and not steps[-1].get("use_regex", True) and (composes or not normalises):
            return name
    raise ModelError(
        f"the tokenizer of '{folder}' ({type(tokenizer).__name__}) cuts text in a way that is not known to be one of "
        "llama.cpp's. Convert it with llama.cpp's own convert_hf_to_gguf.py."
    )


def _read_back(source: Source, file: Path, form: str) -> Agreement:
    """The model in the file against the one in the folder, both in fp32, and their tokens of a text."""
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        again = import_gguf(file, Path(place) / "model", "float32", lambda line: None, try_it=False)
        from transformers import AutoTokenizer

        if (source.architecture, source.pre) in _READ_AS_WRITTEN:  # other ways are lost on transformers' reader
            wanted = source.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            found = AutoTokenizer.from_pretrained(again)(PROBE, add_special_tokens=False)["input_ids"]
            if wanted != found:
                raise ModelError(f"read back from GGUF, the tokenizer makes {found} of a text instead of {wanted}.")
        rows = prompt_rows(source.folder)
        models = (load_model(str(f), dtype=torch.float32, attention=("sdpa",)) for f in (source.folder, again))
        agreement = agreement_of(models, rows, BOUNDS[form])
        shutil.rmtree(again)
    if not agreement.kl <= agreement.bound:
        raise ModelError(f"read back from GGUF, the model is not the one in {source.folder}: {agreement}.")
    return agreement
