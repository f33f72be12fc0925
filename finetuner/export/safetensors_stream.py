"""safetensors files read and written one tensor at a time, whatever their size.

The library's own `save_file` wants all tensors of a file in memory. The format (huggingface.co/docs/safetensors):
8 bytes little-endian length of the header, the header as JSON, then the tensors' bytes at the offsets it names.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuner.errors import ModelError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library's own bound


@dataclass(frozen=True)
class TensorInfo:
    """Format's dtype name and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * torch.empty(0, dtype=DTYPES[self.dtype]).element_size()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """name -> dtype and shape, in the order of the bytes. Raises ModelError for a file cut short or of another kind."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"'{path}' is not a safetensors file, or was cut short ({size:,} bytes). Fetch it again.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError(f"'{path}' is not a safetensors file: its header is not JSON. Fetch it again.") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    if expected != size:
        raise ModelError(f"'{path}' has {size:,} bytes, but its header promises {expected:,}. Fetch it again.")
    unknown = {info["dtype"] for info in header.values()} - DTYPES.keys()
    if unknown:
        raise ModelError(f"'{path}' holds tensors of type {', '.join(sorted(unknown))}, which cannot be merged.")
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    return {name: TensorInfo(header[name]["dtype"], tuple(header[name]["shape"])) for name in ordered}


def write_stream(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write `tensors`, which come one at a time in the order of `infos` and as it says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in infos.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.num_bytes]}
        at += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), (expected, info) in zip(tensors, infos.items(), strict=True):
            assert name == expected and tuple(tensor.shape) == info.shape and NAMES[tensor.dtype] == info.dtype, name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
