"""An adapter into its base, tensor by tensor: memory for a few tensors, whatever the model's size.

An adapter that was trained on a base in 4 or 8 bits corrects that base's rounding too. Modules that were quantised then
go through the same round trip before the adapter is added, so that the merged model is the one that was trained.
"""

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetuner.checkpoint.folder import aside_of, written_aside
from finetuner.errors import ModelError
from finetuner.export.adapter_updates import Change, Changes, Tied, base_name, read_changes
from finetuner.export.training_base import quantised_tensors, record_for
from finetuner.models.embeddings import is_tied
from finetuner.models.empty_model import meta_model
from finetuner.models.files import INDEX, find_base, weight_files
from finetuner.models.generation_config import write_generation_config
from finetuner.models.quant_record import QuantRecord, quantization_round_trip
from finetuner.storage.safetensors_stream import NAMES, TensorInfo, read_header, read_tensor, write_stream

Report = Callable[[int, int], None]  # bytes done, bytes in all

MARK = "merge.json"
MOST_AHEAD = 4  # tensors in memory beside the one that is written
# What travels from the training run (its template, its added tokens), and what from the base.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
BASE_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Form:
    """How the merged model is written; None: as the base is. `dequantise`: onto the base as it was quantised in
    training, or not; None: onto what training saw, as far as that is known."""

    dtype: torch.dtype | None = None
    shard_bytes: int | None = None
    dequantise: bool | None = None


@dataclass(frozen=True)
class Merged:
    """What was done."""

    folder: Path
    num_merged: int
    num_tensors: int
    num_dequantised: int
    num_bytes: int
    num_bytes_kept: int  # of them, those that a merge which was killed had written
    untied: bool
    seconds: float


@dataclass(frozen=True)
class Piece:
    """One tensor of the result: where it comes from, and what becomes of it."""

    name: str
    source: Path
    info: TensorInfo
    after: TensorInfo
    change: Change | None
    record: QuantRecord | None


def merge_adapter(
    adapter: Path,
    base_model: str,
    output: Path,
    report: Report = lambda done, total: None,
    token_ids: dict[str, int] | None = None,
    form: Form = Form(),
) -> Merged:
    """Write base + adapter to `output`.

    `token_ids` are special tokens by role ("eos_token_id") that the recipe changed and generation has to know.

    Everything that can be wrong is looked at before the first byte is written: raises ModelError for an adapter that
    does not fit, a base that is damaged or pickled, an output folder with other things in it, a full disk. After a
    kill, the same merge goes on behind the last file that it had finished.
    """
    started = time.monotonic()
    base = find_base(base_model)
    _require_replaceable(output, base, adapter)
    infos, changes, quantised, files = plan_merge(adapter, base, form)
    num_bytes = sum(piece.after.num_bytes for pieces in files.values() for piece in pieces)
    work = _work(adapter, infos, files)
    output.parent.mkdir(parents=True, exist_ok=True)
    _require_space(output, num_bytes)
    done = kept = 0
    with written_aside(output, work) as aside:
        for file_name, pieces in files.items():
            if (aside / file_name).exists():  # renamed when it was whole
                kept += sum(piece.after.num_bytes for piece in pieces)
                done = kept
                continue

            def counted(pieces: list[Piece] = pieces) -> Iterator[tuple[str, torch.Tensor]]:
                nonlocal done
                for piece, tensor in _ahead(pieces):
                    yield piece.name, tensor
                    done += piece.after.num_bytes
                    report(done, num_bytes)

            part = aside / f"{file_name}.part"
            write_stream(part, {piece.name: piece.after for piece in pieces}, counted())
            part.rename(aside / file_name)
        _write_beside(base, adapter, aside, files, num_bytes, changes.unties, form, token_ids or {})
    seconds = time.monotonic() - started
    num_merged, num_tensors = len(changes.by_name), sum(map(len, files.values()))
    return Merged(output, num_merged, num_tensors, len(quantised), num_bytes, kept, changes.unties, seconds)


def plan_merge(
    adapter: Path, base: Path, form: Form
) -> tuple[dict[Path, dict[str, TensorInfo]], Changes, dict[str, QuantRecord], dict[str, list[Piece]]]:
    """The base's files, what the adapter changes, what was quantised, and the files of the result. Raises ModelError
    for what cannot be merged."""
    infos = {path: read_header(path) for path in weight_files(base)}
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        raise ModelError(f"the base model '{base}' is quantised; an adapter is merged into full weights. Name those.")
    shapes = {name: info.shape for of_file in infos.values() for name, info in of_file.items()}
    tied = _tied_pair(adapter, base, set(shapes))
    changes = read_changes(adapter, shapes, tied)
    quantised = quantised_tensors(record_for(adapter, base, form.dequantise), set(shapes))
    return infos, changes, quantised, plan_files(infos, changes, tied, quantised, form)


def _ahead(pieces: list[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """In their order, while as many as there are cores are read and merged ahead of the one that is written.

    A tensor for each core, not all cores for a tensor: reading and rounding use one core only.
    """
    threads = torch.get_num_threads()
    waiting: deque[tuple[Piece, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(min(threads, MOST_AHEAD)) as workers:
        torch.set_num_threads(1)
        try:
            for piece in pieces:
                waiting.append((piece, workers.submit(merged_tensor, piece)))
                if len(waiting) > min(threads, MOST_AHEAD):
                    first, tensor = waiting.popleft()
                    yield first, tensor.result()
                    del tensor
            while waiting:
                first, tensor = waiting.popleft()
                yield first, tensor.result()
        finally:
            torch.set_num_threads(threads)
            for _, tensor in waiting:
                tensor.cancel()


def merged_tensor(piece: Piece) -> torch.Tensor:
    """In fp32 and rounded once. Raises ModelError if the number format of the result cannot hold it."""
    weight = read_tensor(piece.source, piece.info)
    after = next(dtype for dtype, name in NAMES.items() if name == piece.after.dtype)
    if weight.dtype != after:
        weight = weight.float()
    if piece.record is not None:
        weight = quantization_round_trip(weight, piece.record)
    merged = (piece.change.apply(weight) if piece.change is not None else weight).to(after)
    if after == torch.float16 and not torch.isfinite(merged).all():
        raise ModelError(f"'{piece.name}' has values beyond 65504, the largest of float16. Write dtype=bfloat16.")
    return merged


def plan_files(
    infos: dict[Path, dict[str, TensorInfo]],
    changes: Changes,
    tied: Tied | None,
    quantised: dict[str, QuantRecord],
    form: Form,
) -> dict[str, list[Piece]]:
    """Name of each file of the result -> its tensors: the base's own files, or files of `form.shard_bytes`."""
    files: dict[str, list[Piece]] = {}
    for path, of_file in infos.items():
        files[path.name] = []
        for name, info in of_file.items():
            change = changes.by_name.get(name)
            files[path.name].append(_piece(name, path, info, name, change, quantised.get(name), form))
            if changes.unties and tied is not None and name == tied.embedding:
                head = _piece(tied.head, path, info, name, changes.head, None, form)
                if head.after.shape != files[path.name][-1].after.shape:
                    raise ModelError(
                        f"the adapter's embedding has {files[path.name][-1].after.shape[0]} rows and the head, which "
                        f"was tied to it, {head.after.shape[0]}: the adapter has only one of the two."
                    )
                files[path.name].append(head)
    if form.shard_bytes is None:
        return files
    shards: list[list[Piece]] = [[]]
    room = form.shard_bytes
    for piece in (piece for pieces in files.values() for piece in pieces):
        if shards[-1] and piece.after.num_bytes > room:
            shards.append([])
            room = form.shard_bytes
        shards[-1].append(piece)
        room -= piece.after.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": pieces for i, pieces in enumerate(shards, 1)}


def _piece(
    name: str, path: Path, info: TensorInfo, source: str, change: Change | None, record: QuantRecord | None, form: Form
) -> Piece:
    shape = info.shape if change is None else change.shape_after(source, info.shape)
    can_be_added_to = info.dtype in ("F64", "F32", "F16", "BF16")
    if change is not None and not can_be_added_to:
        raise ModelError(
            f"'{name}' of the base is stored as {info.dtype}, which is too coarse to add an update to. Name a base in "
            "bfloat16, float16 or float32."
        )
    cast = form.dtype is not None and can_be_added_to
    after = replace(info, shape=shape, dtype=NAMES[form.dtype] if cast and form.dtype else info.dtype)
    return Piece(name, path, info, after, change, record)


def _tied_pair(adapter: Path, base: Path, base_names: set[str]) -> Tied | None:
    """Embedding and head of a base that are one tensor; looked at only for an adapter that may change one of them."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.exists():  # said by read_changes
        return None
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    modules = {key.rpartition(ending)[0] for key in read_header(weights) for ending in endings if key.endswith(ending)}
    known = {module.removeprefix("base_model.model.") + ".weight" for module in modules}
    plain = all(key.endswith(endings) for key in read_header(weights))
    if plain and all(name in base_names or name.partition(".")[2] in base_names for name in known):
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
    return Tied(base_name(embedding, embedding, base_names), head)


def _require_replaceable(output: Path, base: Path, adapter: Path) -> None:
    """A folder that an earlier merge wrote may be replaced; anything else stays."""
    for what, folder in (("the base model", base), ("the adapter", adapter)):
        if output.resolve() == folder.resolve():
            raise ModelError(f"output '{output}' is the folder of {what} itself. Name another: output=...")
    if output.exists() and not (output / MARK).exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"'{output}' holds something that is not a merge of ours. Move it away first.")


def _require_space(output: Path, num_bytes: int) -> None:
    """What an interrupted merge has written counts as room: it is gone on with, or deleted."""
    aside = aside_of(output)
    there = sum(path.stat().st_size for path in aside.iterdir()) if aside.is_dir() else 0
    free = shutil.disk_usage(output.parent).free + there
    if num_bytes > free:
        raise ModelError(
            f"the merged model needs {num_bytes / 1e9:.2f} GB, and {output.parent} has {free / 1e9:.2f} free.\n"
            "Make room, or name a folder on another disk: output=..."
        )


def adapter_digest(adapter: Path) -> str:
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _work(adapter: Path, infos: dict[Path, dict[str, TensorInfo]], files: dict[str, list[Piece]]) -> str:
    """All that the bytes of the result depend on."""
    stats = {str(path.resolve()): (path.stat().st_size, path.stat().st_mtime_ns) for path in infos}
    layout = {name: [(p.name, p.after.dtype, p.after.shape) for p in pieces] for name, pieces in files.items()}
    settings = (adapter / "adapter_config.json").read_text()
    kept = {p.name: str(replace(p.record, modules=())) for of_file in files.values() for p in of_file if p.record}
    return json.dumps([stats, layout, adapter_digest(adapter), settings, kept])


def _write_beside(
    base: Path,
    adapter: Path,
    aside: Path,
    files: dict[str, list[Piece]],
    num_bytes: int,
    unties: bool,
    form: Form,
    token_ids: dict[str, int],
) -> None:
    """Config, tokenizer, index and the mark."""
    for name in BASE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, aside / name)
    config: dict[str, Any] = json.loads((aside / "config.json").read_text())
    pieces = [piece for of_file in files.values() for piece in of_file]
    # only tables with a row per token can grow
    grown = [piece.after.shape[0] for piece in pieces if piece.after.shape != piece.info.shape]
    if grown:
        config.get("text_config", config)["vocab_size"] = max(grown)
    if unties:
        config["tie_word_embeddings"] = False
    if form.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(form.dtype).removeprefix("torch.")
    (aside / "config.json").write_text(json.dumps(config | token_ids, indent=2) + "\n")
    has_tokenizer = [name for name in TOKENIZER_FILES if (adapter / name).exists()]
    for name in TOKENIZER_FILES:
        source = adapter if has_tokenizer else base
        if (source / name).exists():
            shutil.copyfile(source / name, aside / name)
    write_generation_config(aside, token_ids)
    if len(files) > 1:
        weight_map = {piece.name: name for name, of_file in files.items() for piece in of_file}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    mark = {"base_model": str(base), "adapter": str(adapter), "adapter_sha256": adapter_digest(adapter)}
    (aside / MARK).write_text(json.dumps(mark, indent=1) + "\n")
