"""Sharded checkpoints: each rank writes its shards, and any number of ranks reads full tensors out of all files.

A file is safetensors; its metadata says for every tensor at which row of the full one it begins: {"name": 128}.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from finetuner.errors import CheckpointError
from finetuner.parallel.engine import local_shard
from finetuner.parallel.optimizer_state import OF_SHARDS

PATTERN = "part-*.safetensors"
MODEL_PART, OPTIMIZER_PART = "model/", "optimizer/"  # prefixes of names in a file


def write_shard(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write this rank's rows of every tensor (any shapes) to a file of its own.

    Of several copies of the model one writes; what is not sharded is written by rank 0.
    """
    mine: dict[str, torch.Tensor] = {}
    first_row: dict[str, int] = {}
    index, writes = 0, True
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            coordinate = tensor.device_mesh.get_coordinate()
            assert coordinate is not None and tensor.placements[-1] == Shard(0)
            index = coordinate[-1]
            writes = all(c == 0 for c in coordinate[:-1])
            rows_per_rank = -(-tensor.shape[0] // tensor.device_mesh.shape[-1])  # as torch.chunk divides
            first_row[name] = min(tensor.shape[0], index * rows_per_rank)
        elif torch.distributed.get_rank() != 0 and not name.startswith(OPTIMIZER_PART + OF_SHARDS):
            continue
        mine[name] = local_shard(tensor).detach().cpu().contiguous()
    if writes:
        save_file(mine, folder / f"part-{index:05}.safetensors", metadata={"first_row": json.dumps(first_row)})


def is_sharded(folder: Path) -> bool:
    """Return whether a checkpoint was written by every rank, each its shards."""
    return any(folder.glob(PATTERN))


class ShardedTensors(Mapping[str, torch.Tensor]):
    """name -> full tensor on the CPU, read from all files when it is asked for: one is in memory at a time."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """Take the tensors whose names begin with `prefix`, which is left out of the keys."""
        self.prefix = prefix
        self.pieces: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted(folder.glob(PATTERN)):
            with safe_open(path, framework="pt") as file:
                first_row = json.loads((file.metadata() or {}).get("first_row", "{}"))
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(prefix):
                        self.pieces.setdefault(name.removeprefix(prefix), []).append((first_row.get(name, 0), path))

    def __getitem__(self, name: str) -> torch.Tensor:
        rows = []
        for _, path in sorted(self.pieces[name]):
            with safe_open(path, framework="pt") as file:
                rows.append(file.get_tensor(self.prefix + name))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


@torch.no_grad()
def read_shards(model: nn.Module, folder: Path, *, trained_only: bool) -> None:
    """Copy a sharded checkpoint into a model that is not sharded yet.

    Raises CheckpointError if the checkpoint is of another model.
    """
    stored = ShardedTensors(folder, MODEL_PART)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}
    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise CheckpointError(
            f"the checkpoint {folder} is not of this model and recipe: '{missing[0]}' and {len(missing) - 1} more "
            "tensors are missing. Use the recipe that it was written with."
        )
    for name, parameter in wanted.items():
        value = stored[name]
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint {folder} is not of this model and recipe: '{name}' is {tuple(value.shape)} there and "
                f"{tuple(parameter.shape)} here. Use the recipe that it was written with."
            )
        parameter.copy_(value)
