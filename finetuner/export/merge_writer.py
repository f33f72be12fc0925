"""Write base + adapter tensor by tensor: memory for a few tensors, whatever the model's size."""

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

from finetuner.errors import ModelError
from finetuner.export.merge_plan import AS_THE_BASE_IS, MergedTensor, MergeFormat, MergePlan, plan_merge
from finetuner.models.files import INDEX, find_base
from finetuner.models.generation_config import write_generation_config
from finetuner.storage.atomic import staged_folder, staging_of
from finetuner.storage.safetensors_stream import write_stream

ByteProgress = Callable[[int, int], None]  # bytes done, bytes in all

MERGE_FILE = "merge.json"  # marks a folder that may be replaced; names base and adapter
MOST_AHEAD = 4  # tensors in memory besides the one that is written
# What comes from the training run (its template, its added tokens), and what from the base.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
BASE_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class WrittenMerge:
    """Figures of a merged model that was written."""

    folder: Path
    num_tensors_merged: int  # those that the adapter changes
    num_tensors: int
    num_tensors_dequantized: int  # those that take the rounding of the base in training
    num_bytes: int
    num_bytes_reused: int  # of them, those that an interrupted merge had written
    untied: bool  # embedding and head, which were one tensor, are two
    seconds: float


def merge_adapter(
    adapter: Path,
    base_model: str,
    output: Path,
    report: ByteProgress = lambda done, total: None,
    token_ids: dict[str, int] | None = None,
    form: MergeFormat = AS_THE_BASE_IS,
) -> WrittenMerge:
    """Write base + adapter to `output`.

    `token_ids` are special tokens by role ("eos_token_id") that the recipe changed and generation has to know.

    Everything that can be wrong is looked at before the first byte is written: raises ModelError for an adapter that
    does not fit, a base that is damaged or pickled, an output folder with other things in it, a full disk. After a
    kill, the same merge goes on after the last file that it had finished.
    """
    started = time.monotonic()
    base = find_base(base_model)
    _require_replaceable(output, base, adapter)
    plan = plan_merge(adapter, base, form)
    output.parent.mkdir(parents=True, exist_ok=True)
    _require_space(output, plan.num_bytes)
    with staged_folder(output, task=_fingerprint(adapter, plan)) as staging:
        reused = _write_weights(plan, staging, report)
        _write_config(base, staging, plan, form, token_ids or {})
        _copy_tokenizer(base, adapter, staging)
        write_generation_config(staging, token_ids or {})
        _write_index(plan, staging)
        mark = {"base_model": str(base), "adapter": str(adapter), "adapter_sha256": adapter_digest(adapter)}
        (staging / MERGE_FILE).write_text(json.dumps(mark, indent=1) + "\n")
    return WrittenMerge(
        output,
        num_tensors_merged=len(plan.updates.by_name),
        num_tensors=len(plan.tensors),
        num_tensors_dequantized=plan.num_dequantized,
        num_bytes=plan.num_bytes,
        num_bytes_reused=reused,
        untied=plan.updates.unties,
        seconds=time.monotonic() - started,
    )


def _write_weights(plan: MergePlan, staging: Path, report: ByteProgress) -> int:
    """Write the files that are not there yet; return the bytes of those that were."""
    total, done, reused = plan.num_bytes, 0, 0
    for file_name, tensors in plan.files.items():
        if (staging / file_name).exists():  # renamed when it was complete
            reused += sum(tensor.after.num_bytes for tensor in tensors)
            done = reused
            continue

        def _counted(tensors: list[MergedTensor] = tensors) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal done
            for planned, tensor in _computed_ahead(tensors):
                yield planned.name, tensor
                done += planned.after.num_bytes
                report(done, total)

        partial = staging / f"{file_name}.part"
        write_stream(partial, {tensor.name: tensor.after for tensor in tensors}, _counted())
        partial.rename(staging / file_name)
    return reused


def _computed_ahead(tensors: list[MergedTensor]) -> Iterator[tuple[MergedTensor, torch.Tensor]]:
    """Yield in their order, while as many as there are cores are read and merged ahead of the one that is written.

    A tensor for each core, not all cores for a tensor: reading and rounding use one core only.
    """
    threads = torch.get_num_threads()
    waiting: deque[tuple[MergedTensor, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(min(threads, MOST_AHEAD)) as workers:
        torch.set_num_threads(1)
        try:
            for planned in tensors:
                waiting.append((planned, workers.submit(planned.compute)))
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


def _require_replaceable(output: Path, base: Path, adapter: Path) -> None:
    """Raise ModelError unless the folder is free or of an earlier merge."""
    for what, folder in (("the base model", base), ("the adapter", adapter)):
        if output.resolve() == folder.resolve():
            raise ModelError(f"output '{output}' is the folder of {what} itself. Name another: output=...")
    if output.exists() and not (output / MERGE_FILE).exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"'{output}' holds something that is not a merge of ours. Move it away first.")


def _require_space(output: Path, num_bytes: int) -> None:
    """Raise ModelError unless the disk has room. What an interrupted merge wrote counts as room: it is continued, or
    deleted."""
    staging = staging_of(output)
    written = sum(path.stat().st_size for path in staging.iterdir()) if staging.is_dir() else 0
    free = shutil.disk_usage(output.parent).free + written
    if num_bytes > free:
        raise ModelError(
            f"the merged model needs {num_bytes / 1e9:.2f} GB, and {output.parent} has {free / 1e9:.2f} free.\n"
            "Make room, or name a folder on another disk: output=..."
        )


def adapter_digest(adapter: Path) -> str:
    """sha256 of the adapter's weights, in hexadecimal."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(adapter: Path, plan: MergePlan) -> str:
    """Text of all that the bytes of the result depend on: two merges of one text may share their files."""
    stats = {str(path.resolve()): (path.stat().st_size, path.stat().st_mtime_ns) for path in plan.headers}
    layout = {name: [(t.name, t.after.dtype, t.after.shape) for t in tensors] for name, tensors in plan.files.items()}
    settings = (adapter / "adapter_config.json").read_text()
    records = {t.name: str(replace(t.record, modules=())) for t in plan.tensors if t.record}
    return json.dumps([stats, layout, adapter_digest(adapter), settings, records])


def _write_config(base: Path, staging: Path, plan: MergePlan, form: MergeFormat, token_ids: dict[str, int]) -> None:
    """Copy the base's config files, with the vocabulary, ties and number format of the result."""
    for name in BASE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, staging / name)
    config: dict[str, Any] = json.loads((staging / "config.json").read_text())
    # only tables with a row per token can grow
    grown = [tensor.after.shape[0] for tensor in plan.tensors if tensor.after.shape != tensor.info.shape]
    if grown:
        config.get("text_config", config)["vocab_size"] = max(grown)
    if plan.updates.unties:
        config["tie_word_embeddings"] = False
    if form.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(form.dtype).removeprefix("torch.")
    (staging / "config.json").write_text(json.dumps(config | token_ids, indent=2) + "\n")


def _copy_tokenizer(base: Path, adapter: Path, staging: Path) -> None:
    """Copy the adapter's tokenizer, or the base's if the adapter has none."""
    source = adapter if any((adapter / name).exists() for name in TOKENIZER_FILES) else base
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, staging / name)


def _write_index(plan: MergePlan, staging: Path) -> None:
    """Write which file holds which tensor, where there are several files."""
    if len(plan.files) > 1:
        weight_map = {tensor.name: name for name, tensors in plan.files.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
