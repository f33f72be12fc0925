"""A LoRA adapter into its base, tensor by tensor: memory for a few tensors, whatever the model's size.

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
from safetensors.torch import load_file

from finetuner.checkpoint import written_aside
from finetuner.errors import ModelError
from finetuner.export.safetensors_stream import TensorInfo, read_header, write_stream
from finetuner.models.quantized import RECORD, Record, read_record, require_bitsandbytes, seen_in_training

Report = Callable[[int, int], None]  # MB done, MB in all

MARK = "merge.json"
INDEX = "model.safetensors.index.json"
# What travels from the training run (its template, its added tokens), and what from the base.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
BASE_FILES = ("config.json", "generation_config.json")
# PEFT's settings under which W + scale * B A is not the whole truth.
UNSUPPORTED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication", "rank_pattern", "alpha_pattern",
    "target_parameters", "use_qalora", "exclude_modules",
)  # fmt: skip
UNSUPPORTED_NOTE = "PEFT's own merge_and_unload can do it where the model fits into memory."


@dataclass(frozen=True)
class Merged:
    """What was done."""

    folder: Path
    num_merged: int
    num_tensors: int
    num_dequantised: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Change:
    """What happens to one tensor of the base: W + scale * B A, or rows `ids` replaced by `rows`."""

    a: torch.Tensor | None = None  # (rank, in)
    b: torch.Tensor | None = None  # (out, rank)
    scale: float = 1.0
    rows: torch.Tensor | None = None  # (len(ids), width)
    ids: tuple[int, ...] = ()

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Raises ModelError if the adapter does not fit the base."""
        if self.rows is not None:
            if self.rows.shape[1] != shape[1]:
                raise ModelError(_misfit(name, shape, tuple(self.rows.shape)))
            return (max(shape[0], max(self.ids) + 1), shape[1])
        assert self.a is not None and self.b is not None
        delta = (self.b.shape[0], self.a.shape[1])
        if delta != shape:
            raise ModelError(_misfit(name, shape, delta))
        return shape

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In fp32, rounded to `dtype` once at the end."""
        if self.rows is None:
            assert self.a is not None and self.b is not None
            merged = self.b.float() @ self.a.float()
            merged.mul_(self.scale).add_(weight)  # in place: fresh pages cost more than the arithmetic
            return merged.to(dtype)
        grown = weight.new_zeros(max(weight.shape[0], max(self.ids) + 1), weight.shape[1])
        grown[: len(weight)] = weight
        grown[list(self.ids)] = self.rows.to(weight.dtype)
        return grown.to(dtype)


def require_same_base(adapter: Path, base_model: str) -> None:
    """Raises ModelError if the adapter says that it was trained on another base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
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
        _write_beside(base, adapter, aside, after, num_bytes, changes, token_ids or {})
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
            yield name, changes[name].apply(seen, weight.dtype) if name in changes else seen.to(weight.dtype)


def read_quantised(adapter: Path, base_names: set[str]) -> dict[str, Record]:
    """Base tensor -> how it was kept while the adapter was trained, for those that were quantised."""
    record = read_record(adapter)
    if record is None:
        return {}
    require_bitsandbytes()
    return {_base_name(module, f"{module} of {RECORD}", base_names): record for module in record.modules}


def read_changes(adapter: Path, base_names: set[str]) -> dict[str, Change]:
    """Base tensor -> what the adapter does to it. Raises ModelError for a tensor that matches none."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the adapter in '{adapter}': {error}") from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"the adapter in '{adapter}' is of type {config.get('peft_type')}; only LORA can be merged.")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ModelError(_unsupported(adapter, f"{key}: {config[key]}"))
    if config.get("bias", "none") != "none":
        raise ModelError(_unsupported(adapter, f"bias: {config['bias']}"))
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    changes: dict[str, Change] = {}
    for key, tensor in tensors.items():
        module, kind = _split_key(key)
        name = _base_name(module, key, base_names)
        change = changes.get(name, Change(scale=scale))
        if kind == "lora_A.weight":
            change = replace(change, a=tensor)
        elif kind == "lora_B.weight":
            change = replace(change, b=tensor)
        else:
            ids = config["trainable_token_indices"]
            change = replace(change, rows=tensor, ids=tuple(ids[module.rpartition(".")[2]]))
        changes[name] = change
    lone = [name for name, c in changes.items() if c.rows is None and (c.a is None or c.b is None)]
    if lone:
        raise ModelError(
            f"the adapter in '{adapter}' has only half of the update of '{lone[0]}'. Train or fetch it again."
        )
    return changes


def find_base(base_model: str) -> Path:
    """The folder of a base model, fetched from the hub if it is not one on this disk."""
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(base_model, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.json"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the base model '{base_model}' is neither a folder nor reachable on the hub: {first}"
        ) from error


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    if (base / INDEX).exists():
        names = sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [base / name for name in names]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        pickled = (
            " It has pickled weights (.bin), which can run code and are not read." if list(base.glob("*.bin")) else ""
        )
        raise ModelError(f"the base model folder '{base}' has no {missing[0]}.{pickled} Give a folder of safetensors.")
    return files


def _split_key(key: str) -> tuple[str, str]:
    """An adapter key -> (module, kind of tensor)."""
    bare = key.removeprefix("base_model.model.")
    for kind in ("lora_A.weight", "lora_B.weight", "token_adapter.trainable_tokens_delta"):
        if bare.endswith("." + kind):
            return bare.removesuffix("." + kind), kind
    raise ModelError(f"the adapter tensor '{key}' is of a kind that cannot be merged yet. {UNSUPPORTED_NOTE}")


def _base_name(module: str, key: str, base_names: set[str]) -> str:
    # Files saved from the model without its head (older GPT-2, for one) leave out the first part of the name.
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in base_names:
            return name
    raise ModelError(
        f"the adapter tensor '{key}' matches no tensor of the base model: it was trained on another base, or on a head "
        "that is tied to the embedding and so is not in its files."
    )


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
    changes: dict[str, Change],
    token_ids: dict[str, int],
) -> None:
    """Config, tokenizer, index and the mark."""
    for name in BASE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, aside / name)
    config: dict[str, Any] = json.loads((aside / "config.json").read_text())
    rows = [infos[name].shape[0] for infos in after.values() for name in infos if name in changes and changes[name].ids]
    if rows:
        config.get("text_config", config)["vocab_size"] = max(rows)
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


def _unsupported(adapter: Path, what: str) -> str:
    return f"the adapter in '{adapter}' has {what}, which cannot be merged yet. {UNSUPPORTED_NOTE}"


def _misfit(name: str, base: tuple[int, ...], adapter: tuple[int, ...]) -> str:
    return (
        f"the adapter does not fit the base model: '{name}' has shape {base} in the base and {adapter} in the adapter. "
        "Was it trained on another base?"
    )
