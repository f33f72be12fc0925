"""Sharded files: each rank writes what it holds, and any number of ranks reads whole tensors out of all of them.

A part file is safetensors; its metadata says for every tensor where its rows begin in the whole: {"name": 128}.
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
from finetuner.parallel.engine import local_part

PATTERN = "part-*.safetensors"
MODEL_PART, OPTIMIZER_PART = "model/", "optimizer/"  # what a name in a part file begins with


def write_part(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """This rank's rows of every tensor, by the one copy of the model that writes. What is not sharded is rank 0's."""
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
        elif torch.distributed.get_rank() != 0:
            continue
        mine[name] = local_part(tensor).detach().cpu().contiguous()
    if writes:
        save_file(mine, folder / f"part-{index:05}.safetensors", metadata={"first_row": json.dumps(first_row)})


def has_parts(folder: Path) -> bool:
    return any(folder.glob(PATTERN))


class Parts(Mapping[str, torch.Tensor]):
    """name -> whole tensor on the CPU, read from the files when it is asked for, so that one is in memory at a time."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """`prefix`: of the names that are meant; it is left out of the keys."""
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
def read_parts(model: nn.Module, folder: Path, *, trained_only: bool) -> None:
    """Copy a checkpoint in parts into a model that is still whole. Raises CheckpointError if it is of another."""
    parts = Parts(folder, MODEL_PART)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}
    missing = sorted(set(wanted) - set(parts))
    if missing:
        raise CheckpointError(
            f"the checkpoint {folder} is not of this model and recipe: '{missing[0]}' and {len(missing) - 1} more "
            "tensors are missing. Use the recipe that it was written with."
        )
    for name, parameter in wanted.items():
        value = parts[name]
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint {folder} is not of this model and recipe: '{name}' is {tuple(value.shape)} there and "
                f"{tuple(parameter.shape)} here. Use the recipe that it was written with."
            )
        parameter.copy_(value)
