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

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library's own bound
FLUSH_BYTES = 1 << 27


@dataclass(frozen=True)
class TensorInfo:
    """The format's name for a tensor's dtype, its shape, and the byte of the file at which it begins."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = field(default=0, compare=False)

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * torch.empty(0, dtype=SAFETENSORS_DTYPES[self.dtype]).element_size()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return name -> info of every tensor, in the order of their bytes.

    Raises ModelError for a file that was cut short or is of another kind."""
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
    unknown = {info["dtype"] for info in header.values()} - SAFETENSORS_DTYPES.keys()
    if unknown:
        raise ModelError(f"'{path}' holds tensors of type {', '.join(sorted(unknown))}, which cannot be merged.")
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    return {
        name: TensorInfo(info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
        for name, info in ((name, header[name]) for name in ordered)
    }


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """Read one tensor of shape `info.shape` to the CPU.

    It has memory of its own, since pages of a mapped file would count as this process's for as long as it lives."""
    tensor = torch.empty(info.shape, dtype=SAFETENSORS_DTYPES[info.dtype])
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin)
        rest = _bytes_of(tensor)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise ModelError(f"'{path}' ends before its header says. Fetch it again.")
            rest = rest[count:]
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any shape; writing to them changes it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """A file to which tensors are written in any order, each at its offset. Complete when `missing` is empty."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        """Write the header for tensors of these names, dtypes and shapes."""
        text, begins = _header(infos)
        self.path, self.begins, self.missing = path, begins, set(infos)
        self.infos = dict(infos)
        self.file = path.open("wb", buffering=0)
        self.file.write(text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of the dtype and shape that the header has for it."""
        info = self.infos[name]
        assert tuple(tensor.shape) == info.shape and NAMES[tensor.dtype] == info.dtype, name
        self.file.seek(self.begins[name])
        _write_all(self.file, _bytes_of(tensor.detach().cpu().contiguous()))
        self.missing.discard(name)

    def close(self) -> None:
        """Put the file on the disk, and close it."""
        os.fsync(self.file.fileno())
        self.file.close()


def write_stream(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a file of `tensors`, each of the dtype and shape that `infos` has for it and in its order. One is in memory
    at a time. They are on the disk when this returns.

    They are flushed while others are computed: left to the kernel, the disk would begin when nothing else is to do.
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


def _write_all(file: FileIO, rest: memoryview) -> None:
    """Write all bytes: a single unbuffered write may take some of them, and never more than 2 GB."""
    while rest:
        rest = rest[file.write(rest) :]


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the tensors, and name -> the byte of the file at which its tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for name, info in infos.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.num_bytes]}
        offsets[name] = at
        at += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}
