"""Write a model folder as one GGUF file, tensor by tensor, for llama.cpp and what is built on it; and read it back.

In a Llama's query and key projections GGUF stores the two halves of a rotated pair next to each other where
transformers stores them half a head apart: rows change places. GPT-2's matrices are transposed: transformers stores
them (in, out). Norms, biases and learned positions stay in fp32, as llama.cpp's kernels want them.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.errors import ModelError
from finetuner.export.gguf_source import GGUFSource, read_source
from finetuner.export.verify_logits import LogitAgreement, logit_agreement, prompt_rows
from finetuner.models.gguf_import import import_gguf
from finetuner.models.load import load_model
from finetuner.models.stop_tokens import stop_token_ids
from finetuner.storage.safetensors_stream import read_tensor

FORMATS = ("f16", "q8_0")
# Mean KL divergence in nats a token. q8_0 rounds each weight to one of 255 steps of its block of 32.
GGUF_KL_BOUNDS = {"f16": 1e-4, "q8_0": 1e-2}
Q8_BLOCK = 32  # weights that share a scale
PROBE = "Naïve  text,\n\twith 2  numbers: 10, 2026!"

_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
# Where transformers' reader of an architecture cuts text as the file says.
_READ_AS_WRITTEN = {("llama", "gpt-2"), ("llama", "smollm"), ("qwen2", "qwen2"), ("gpt2", "gpt-2")}


def export_gguf(folder: Path, output: Path, form: str, report: Callable[[int, int], None]) -> LogitAgreement:
    """Write the file `output`, read it back, and compare. `report` takes (bytes done, bytes in all).

    Raises ModelError, and leaves no file, if it is not the same model within the rounding of `form` (f16 or q8_0)."""
    if form not in FORMATS:
        raise ModelError(f"'{form}' is not a form that can be written. Write one of {', '.join(FORMATS)}.")
    if output.exists():
        raise ModelError(f"{output} exists. Name another file, or delete it: rm {output}")
    source = read_source(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial.gguf")
    partial.unlink(missing_ok=True)
    try:
        _write(source, partial, form, report)
        agreement = _read_back(source, partial, form)
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    return agreement


def _write(source: GGUFSource, file: Path, form: str, report: Callable[[int, int], None]) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, source.architecture)
    _add_sizes(writer, source, form)
    _add_tokenizer(writer, source)
    planned = _plan_tensors(source, form)
    for one in planned:
        if one.dtype is None:
            in_bytes = gguf.quant_shape_to_byte_shape(one.shape, one.kind)
            writer.add_tensor_info(one.gguf_name, in_bytes, np.dtype("uint8"), one.num_bytes, raw_dtype=one.kind)
        else:
            writer.add_tensor_info(one.gguf_name, one.shape, one.dtype, one.num_bytes)
    total, done = sum(one.num_bytes for one in planned), 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in planned:
        data = gguf.quants.quantize(_as_gguf_stores_it(source, one.name), one.kind)
        if one.kind.name == "F16" and data.size and not bool((abs(data) <= 65504).all()):
            raise ModelError(f"'{one.name}' has values beyond 65504, the largest of f16. Write q8_0.")
        writer.write_tensor_data(data)
        done += data.nbytes
        report(done, total)
    writer.close()


@dataclass(frozen=True)
class _PlannedTensor:
    """One tensor of the file. `kind`: gguf's storage type; `dtype`: numpy's, None where weights are in blocks."""

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    kind: Any
    dtype: Any
    num_bytes: int


def _plan_tensors(source: GGUFSource, form: str) -> list[_PlannedTensor]:
    """Plan names, types and sizes. Raises ModelError for a tensor that the architecture has no place for."""
    import gguf

    layers = source.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[source.architecture.upper()], layers)
    planned = []
    for name, (_, info) in source.tensors.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"the tensor '{name}' of '{source.folder}' has no place in GGUF's {source.architecture}.")
        shape = info.shape[::-1] if _is_transposed(source, name) else info.shape
        kind = _storage_type(name, shape, form)
        block, itemsize = gguf.GGML_QUANT_SIZES[kind]
        dtype = None if block > 1 else np.dtype(np.float32 if kind.name == "F32" else np.float16)
        num_bytes = int(torch.Size(shape).numel()) // block * itemsize
        planned.append(_PlannedTensor(name, gguf_name, shape, kind, dtype, num_bytes))
    return planned


def _is_transposed(source: GGUFSource, name: str) -> bool:
    return source.architecture == "gpt2" and name.endswith(_TRANSPOSED)


def _storage_type(name: str, shape: tuple[int, ...], form: str) -> Any:
    import gguf

    if len(shape) == 1 or name.endswith("wpe.weight"):
        return gguf.GGMLQuantizationType.F32
    full_blocks = shape[-1] % Q8_BLOCK == 0
    return gguf.GGMLQuantizationType.Q8_0 if form == "q8_0" and full_blocks else gguf.GGMLQuantizationType.F16


def _as_gguf_stores_it(source: GGUFSource, name: str) -> NDArray[np.float32]:
    """Read a tensor in fp32, (out, in) of a linear layer; in queries and keys the halves of each rotated pair stand
    next to each other."""
    path, info = source.tensors[name]
    weight = read_tensor(path, info).float()
    config = source.config
    if _is_transposed(source, name):
        weight = weight.t()
    if source.architecture == "llama":
        for layer, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if name.endswith(f".{layer}.weight"):
                weight = weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
    array: NDArray[np.float32] = weight.contiguous().numpy()
    return array


def _add_sizes(writer: Any, source: GGUFSource, form: str) -> None:
    import gguf

    config = source.config
    writer.add_name(source.folder.resolve().name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if source.architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[form])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, source: GGUFSource) -> None:
    import gguf

    tokenizer: Any = source.tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(source.pre_tokenizer)
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(source.config.vocab_size):
        tokens.append(by_id.get(token_id, f"[PAD{token_id}]"))  # a table may have more rows than there are tokens
        if token_id not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif token_id in added:
            types.append(gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(_merges(source.folder)))
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    stops = stop_token_ids(tokenizer)
    if len(stops) > 1:
        writer.add_eot_token_id(stops[-1])
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _merges(folder: Path) -> Iterator[str]:
    for merge in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]:
        yield merge if isinstance(merge, str) else " ".join(merge)


def _read_back(source: GGUFSource, file: Path, form: str) -> LogitAgreement:
    """Compare the model in the file with the one in the folder, both in fp32, and their tokens of a text.

    Raises ModelError if either differs."""
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        again = import_gguf(file, Path(place) / "model", "float32", lambda line: None, try_it=False)
        from transformers import AutoTokenizer

        if (source.architecture, source.pre_tokenizer) in _READ_AS_WRITTEN:  # transformers' reader loses other ways
            expected = source.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            found = AutoTokenizer.from_pretrained(again)(PROBE, add_special_tokens=False)["input_ids"]
            if expected != found:
                raise ModelError(f"read back from GGUF, the tokenizer makes {found} of a text instead of {expected}.")
        rows = prompt_rows(source.folder)
        models = (load_model(str(f), dtype=torch.float32, attention=("sdpa",)) for f in (source.folder, again))
        agreement = logit_agreement(models, rows, GGUF_KL_BOUNDS[form])
        shutil.rmtree(again)
    if not agreement.kl <= agreement.bound:
        raise ModelError(f"read back from GGUF, the model is not the one in {source.folder}: {agreement}.")
    return agreement
