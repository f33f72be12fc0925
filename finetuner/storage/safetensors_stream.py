"""safetensors files read and written one tensor at a time, whatever their size.

The library's own `save_file` wants all tensors of a file in memory. The format (huggingface.co/docs/safetensors):
8 bytes little-endian length of the header, the header as JSON, then the tensors' bytes at the offsets it names.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
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
FLUSH_BYTES = 1 << 27


@dataclass(frozen=True)
class TensorInfo:
    """Format's dtype name and shape of one tensor, and the byte of the file at which it begins."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = field(default=0, compare=False)

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
    return {
        name: TensorInfo(info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
        for name, info in ((name, header[name]) for name in ordered)
    }


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor of a file whose header is known, in memory of its own: pages of a mapped file would count as this
    process's for as long as it lives."""
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin)
        room = _bytes_of(tensor)
        while room:
            count = file.readinto(room)
            if not count:
                raise ModelError(f"'{path}' ends before its header says. Fetch it again.")
            room = room[count:]
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """A file whose tensors come in any order: each is written to its place. Complete when `missing` is empty."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        text, begins = _header(infos)
        self.path, self.begins, self.missing = path, begins, set(infos)
        self.infos = dict(infos)
        self.file = path.open("wb", buffering=0)
        self.file.write(text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        info = self.infos[name]
        assert tuple(tensor.shape) == info.shape and NAMES[tensor.dtype] == info.dtype, name
        self.file.seek(self.begins[name])
        _write_all(self.file, _bytes_of(tensor.detach().cpu().contiguous()))
        self.missing.discard(name)

    def close(self) -> None:
        """Flush to the disk."""
        os.fsync(self.file.fileno())
        self.file.close()


def write_stream(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write `tensors`, which come one at a time in the order of `infos` and as it says; they are on the disk then.

    The disk gets its work all along: left to the kernel, it would begin at the end, when nothing else is left to do.
    """
    text, _ = _header(infos)
    unflushed = 0
    flushes: list[Future[None]] = []
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as flusher:
        file.write(text)
        for (name, tensor), (expected, info) in zip(tensors, infos.items(), strict=True):
            assert name == expected and tuple(tensor.shape) == info.shape and NAMES[tensor.dtype] == info.dtype, name
            _write_all(file, _bytes_of(tensor.contiguous()))
            unflushed += info.num_bytes
            if unflushed > FLUSH_BYTES and all(flush.done() for flush in flushes):
                flushes.append(flusher.submit(os.fdatasync, file.fileno()))
                unflushed = 0
        for flush in flushes:  # a disk's error is told to one flush only
            flush.result()
        os.fsync(file.fileno())


def _write_all(file: FileIO, room: memoryview) -> None:
    """A write without a buffer may take only a part, and never more than 2 GB."""
    while room:
        room = room[file.write(room) :]


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors, and where in the file each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for name, info in infos.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.num_bytes]}
        places[name] = at
        at += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + place for name, place in places.items()}
