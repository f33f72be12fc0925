"""Plan a merge from headers and settings alone: each tensor of the result, its source, its update, its file.

An adapter that was trained on a base in 4 or 8 bits corrects that base's rounding too. Modules that were quantized then
go through the same round trip before the adapter is added, so that the merged model is the one that was trained.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetuner.errors import ModelError
from finetuner.export.adapter_updates import AdapterUpdates, TiedPair, base_name, read_adapter_updates
from finetuner.export.quantized_base import quantization_in_training, quantized_tensors
from finetuner.export.tensor_updates import TensorUpdate
from finetuner.models.embeddings import is_tied
from finetuner.models.empty_model import meta_model
from finetuner.models.files import weight_files
from finetuner.models.quant_record import QuantRecord, quantization_round_trip
from finetuner.storage.safetensors_stream import NAMES, TensorInfo, read_header, read_tensor

FLOATS = ("F64", "F32", "F16", "BF16")  # formats fine enough to add an update to
Headers = dict[Path, dict[str, TensorInfo]]


@dataclass(frozen=True)
class MergeFormat:
    """Number format and file size of the merged weights; None: as the base is. `dequantize`: see MergeOptions."""

    dtype: torch.dtype | None = None
    shard_bytes: int | None = None
    dequantize: bool | None = None


AS_THE_BASE_IS = MergeFormat()


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result: `info` of its source in the base, `after` of what is written."""

    name: str
    source: Path
    info: TensorInfo
    after: TensorInfo
    update: TensorUpdate | None
    record: QuantRecord | None  # how it was quantized in training

    def compute(self) -> torch.Tensor:
        """Read the tensor and merge its update into it, in fp32 and rounded once: shape `after.shape`.

        Raises ModelError if the number format of the result cannot hold a value."""
        weight = read_tensor(self.source, self.info)
        after = next(dtype for dtype, name in NAMES.items() if name == self.after.dtype)
        if weight.dtype != after:
            weight = weight.float()
        if self.record is not None:
            weight = quantization_round_trip(weight, self.record)
        merged = (self.update.apply(weight) if self.update is not None else weight).to(after)
        if after == torch.float16 and not torch.isfinite(merged).all():
            raise ModelError(f"'{self.name}' has values beyond 65504, the largest of float16. Write dtype=bfloat16.")
        return merged


@dataclass(frozen=True)
class MergePlan:
    """Files of the result by name, and what they are made from."""

    headers: Headers  # of the base's files
    updates: AdapterUpdates
    num_dequantized: int  # tensors that were quantized in training
    files: dict[str, list[MergedTensor]]

    @property
    def tensors(self) -> list[MergedTensor]:
        """All tensors of the result, file by file."""
        return [tensor for of_file in self.files.values() for tensor in of_file]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights of the result."""
        return sum(tensor.after.num_bytes for tensor in self.tensors)


def plan_merge(adapter: Path, base: Path, form: MergeFormat) -> MergePlan:
    """Plan the merge of an adapter into a base. Raises ModelError for what cannot be merged."""
    headers = {path: read_header(path) for path in weight_files(base)}
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        raise ModelError(f"the base model '{base}' is quantized; an adapter is merged into full weights. Name those.")
    shapes = {name: info.shape for of_file in headers.values() for name, info in of_file.items()}
    tied = _tied_pair(adapter, base, set(shapes))
    updates = read_adapter_updates(adapter, shapes, tied)
    quantized = quantized_tensors(quantization_in_training(adapter, base, form.dequantize), set(shapes))
    files = _files_of_base(headers, updates, tied, quantized, form.dtype)
    if form.shard_bytes is not None:
        files = _shards([tensor for of_file in files.values() for tensor in of_file], form.shard_bytes)
    return MergePlan(headers, updates, len(quantized), files)


def _files_of_base(
    headers: Headers,
    updates: AdapterUpdates,
    tied: TiedPair | None,
    quantized: dict[str, QuantRecord],
    dtype: torch.dtype | None,
) -> dict[str, list[MergedTensor]]:
    """Plan the base's own files; a head that comes untied is written after its embedding."""
    files: dict[str, list[MergedTensor]] = {}
    for path, of_file in headers.items():
        files[path.name] = tensors = []
        for name, info in of_file.items():
            embedding = _merged_tensor(name, path, info, name, updates.by_name.get(name), quantized.get(name), dtype)
            tensors.append(embedding)
            if updates.unties and tied is not None and name == tied.embedding:
                head = _merged_tensor(tied.head, path, info, name, updates.head, None, dtype)
                if head.after.shape != embedding.after.shape:
                    raise ModelError(
                        f"the adapter's embedding has {embedding.after.shape[0]} rows and the head, which was tied to "
                        f"it, {head.after.shape[0]}: the adapter has only one of the two."
                    )
                tensors.append(head)
    return files


def _shards(tensors: list[MergedTensor], shard_bytes: int) -> dict[str, list[MergedTensor]]:
    """Cut the tensors into files of `shard_bytes` at most; a tensor that is larger has a file of its own."""
    shards: list[list[MergedTensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.after.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.after.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _merged_tensor(
    name: str,
    path: Path,
    info: TensorInfo,
    source: str,
    update: TensorUpdate | None,
    record: QuantRecord | None,
    dtype: torch.dtype | None,
) -> MergedTensor:
    shape = info.shape if update is None else update.shape_after(source, info.shape)
    can_be_added_to = info.dtype in FLOATS
    if update is not None and not can_be_added_to:
        raise ModelError(
            f"'{name}' of the base is stored as {info.dtype}, which is too coarse to add an update to. Name a base in "
            "bfloat16, float16 or float32."
        )
    after = replace(info, shape=shape, dtype=NAMES[dtype] if dtype is not None and can_be_added_to else info.dtype)
    return MergedTensor(name, path, info, after, update, record)


def _tied_pair(adapter: Path, base: Path, base_names: set[str]) -> TiedPair | None:
    """Find embedding and head of a base that are one tensor; looked for only if the adapter may change one of them."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.exists():  # said by read_adapter_updates
        return None
    if not _changes_tables(read_header(weights), base_names):
        return None
    try:
        model = meta_model(str(base), dtype=torch.float32, attention=("sdpa", "eager"))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"the adapter in '{adapter}' changes tables of the vocabulary, and '{base}' does not say whether embedding "
            f"and head are one: {str(error).strip().splitlines()[0]}"
        ) from error
    if not is_tied(model):
        return None
    names = {module: name for name, module in model.named_modules()}
    embedding, head = f"{names[model.get_input_embeddings()]}.weight", f"{names[model.get_output_embeddings()]}.weight"
    if head in base_names:  # the files have both
        return None
    return TiedPair(base_name(embedding, embedding, base_names), head)


def _changes_tables(keys: dict[str, TensorInfo], base_names: set[str]) -> bool:
    """Whether an adapter has more than low-rank updates of layers that the base's files have by their names."""
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    modules = {key.removesuffix(ending) for key in keys for ending in endings if key.endswith(ending)}
    names = {module.removeprefix("base_model.model.") + ".weight" for module in modules}
    all_plain = all(key.endswith(endings) for key in keys)
    return not (all_plain and all(name in base_names or name.partition(".")[2] in base_names for name in names))
