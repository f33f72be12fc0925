"""An adapter into its base, tensor by tensor: memory for a few tensors, whatever the model's size.

An adapter that was trained on a base in 4 or 8 bits corrects that base's rounding too. Modules that were quantised then
go through the same round trip before the adapter is added, so that the merged model is the one that was trained.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetuner.checkpoint import written_aside
from finetuner.errors import ModelError
from finetuner.export.changes import Change, base_name, read_changes
from finetuner.models.files import INDEX, find_base, weight_files
from finetuner.models.quantized import RECORD, Record, read_record, require_bitsandbytes, seen_in_training
from finetuner.models.safetensors_stream import TensorInfo, read_header, write_stream

Report = Callable[[int, int], None]  # MB done, MB in all

MARK = "merge.json"
# What travels from the training run (its template, its added tokens), and what from the base.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
BASE_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Merged:
    """What was done."""

    folder: Path
    num_merged: int
    num_tensors: int
    num_dequantised: int
    num_bytes: int
    seconds: float


def require_same_base(adapter: Path, base_model: str) -> None:
    """Raises ModelError if the adapter says that it was trained on another base."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"'{adapter}' is not the folder of an adapter: {error}") from error
    trained_on = config.get("base_model_name_or_path")
    if trained_on and trained_on != base_model and Path(trained_on).resolve() != Path(base_model).resolve():
        raise ModelError(
            f"the adapter in '{adapter}' was trained on '{trained_on}', and the recipe names '{base_model}'.\n"
            f"Merged onto another base it is worthless. If it is the same model: base_model={trained_on}"
        )


def merge_adapter(
    adapter: Path,
    base_model: str,
    output: Path,
    report: Report = lambda done, total: None,
    token_ids: dict[str, int] | None = None,
) -> Merged:
    """Write base + adapter to `output`, in the base's number format and shards.

    `token_ids` are special tokens by role ("eos_token_id") that the recipe changed and generation has to know.

    Everything that can be wrong is looked at before the first byte is written: raises ModelError for an adapter that
    does not fit, a base that is damaged or pickled, an output folder with other things in it, a full disk.
    """
    started = time.monotonic()
    _require_replaceable(output)
    base = find_base(base_model)
    shards = {path: read_header(path) for path in weight_files(base)}
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        raise ModelError(f"the base model '{base}' is quantised; an adapter is merged into full weights. Name those.")
    base_names = {name for infos in shards.values() for name in infos}
    changes = read_changes(adapter, base_names)
    quantised = read_quantised(adapter, base_names)
    after = {
        path: {
            name: replace(info, shape=changes[name].shape_after(name, info.shape)) if name in changes else info
            for name, info in infos.items()
        }
        for path, infos in shards.items()
    }
    # only tables with a row per token can grow
    grown = [after[p][n].shape[0] for p, infos in shards.items() for n, i in infos.items() if after[p][n] != i]
    num_bytes = sum(info.num_bytes for infos in after.values() for info in infos.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise ModelError(
            f"the merged model needs {num_bytes / 1e9:.2f} GB, and {output.parent} has {free / 1e9:.2f} free."
        )
    done = 0
    with written_aside(output) as aside:
        for path, infos in after.items():

            def counted(path: Path = path, infos: dict[str, TensorInfo] = infos) -> Iterator[tuple[str, torch.Tensor]]:
                nonlocal done
                for name, tensor in merged_tensors(path, infos, changes, quantised):
                    yield name, tensor
                    done += infos[name].num_bytes
                    report(done // 1_000_000, num_bytes // 1_000_000)

            write_stream(aside / path.name, infos, counted())
        _write_beside(base, adapter, aside, after, num_bytes, max(grown, default=None), token_ids or {})
    num_tensors = sum(len(infos) for infos in shards.values())
    return Merged(output, len(changes), num_tensors, len(quantised), num_bytes, time.monotonic() - started)


def merged_tensors(
    path: Path, infos: dict[str, TensorInfo], changes: dict[str, Change], quantised: dict[str, Record]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file, changed where the adapter says so; one in memory at a time."""
    with safe_open(str(path), framework="pt") as file:
        for name in infos:
            weight = file.get_tensor(name)
            seen = seen_in_training(weight, quantised[name]) if name in quantised else weight
            yield name, (changes[name].apply(seen) if name in changes else seen).to(weight.dtype)


def read_quantised(adapter: Path, base_names: set[str]) -> dict[str, Record]:
    """Base tensor -> how it was kept while the adapter was trained, for those that were quantised."""
    record = read_record(adapter)
    if record is None:
        return {}
    require_bitsandbytes()
    return {base_name(f"{module}.weight", f"{module} of {RECORD}", base_names): record for module in record.modules}


def _require_replaceable(output: Path) -> None:
    """A folder that an earlier merge wrote may be replaced; anything else stays."""
    if output.exists() and not (output / MARK).exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"'{output}' holds something that is not a merge of ours. Move it away first.")


def _write_beside(
    base: Path,
    adapter: Path,
    aside: Path,
    after: dict[Path, dict[str, TensorInfo]],
    num_bytes: int,
    vocab_size: int | None,
    token_ids: dict[str, int],
) -> None:
    """Config, tokenizer, index and the mark."""
    for name in BASE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, aside / name)
    config: dict[str, Any] = json.loads((aside / "config.json").read_text())
    if vocab_size is not None:
        config.get("text_config", config)["vocab_size"] = vocab_size
    (aside / "config.json").write_text(json.dumps(config | token_ids, indent=2) + "\n")
    generation = aside / "generation_config.json"
    if generation.exists() and token_ids:
        generation.write_text(json.dumps(json.loads(generation.read_text()) | token_ids, indent=2) + "\n")
    found = [name for name in TOKENIZER_FILES if (adapter / name).exists()]
    for name in found:
        shutil.copyfile(adapter / name, aside / name)
    if len(after) > 1:
        weight_map = {name: path.name for path, infos in after.items() for name in infos}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    (aside / MARK).write_text(json.dumps({"base_model": str(base), "adapter_sha256": digest}, indent=1) + "\n")
