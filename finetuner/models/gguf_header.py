"""The header of a GGUF file: its metadata and the names of its tensors."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetuner.errors import ModelError

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "File structure". Everything is little-endian.
MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata of a GGUF file, `values` by key without the arrays, and the names of its tensors."""

    values: dict[str, str | int | float | bool]
    tensors: frozenset[str]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", "unknown"))

    @property
    def scales_rope(self) -> bool:
        """Whether positions are rotated by something else than plain powers of one base, as in Llama 3.1 and Phi-3."""
        kind = self.values.get(f"{self.architecture}.rope.scaling.type", "none")
        factors = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
        return kind != "none" or not factors.isdisjoint(self.tensors)


def read_gguf_header(file: Path) -> GGUFHeader:
    """Read the metadata, in milliseconds (gguf's own reader takes seconds).

    Raises ModelError for a file of another kind or version, a damaged one, and one that is a shard of several."""
    with file.open("rb") as stream:
        magic = stream.read(4)
        if magic != MAGIC:
            raise ModelError(f"{file} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}; give a .gguf file")
        try:
            (version,) = _unpack(stream, "I")
            if version not in VERSIONS:
                raise ModelError(f"{file} is GGUF version {version}; versions 2 and 3 can be read. Convert it again")
            num_tensors, num_values = _unpack(stream, "QQ")
            pairs = ((_string(stream), _value(stream, *_unpack(stream, "I"))) for _ in range(num_values))
            values = {key: value for key, value in pairs if value is not None}
            tensors = frozenset(_tensor_name(stream) for _ in range(num_tensors))
        except (EOFError, OverflowError, MemoryError, UnicodeDecodeError, KeyError) as error:
            raise ModelError(f"{file} is damaged: its header does not parse ({error!r}). Get the file again") from error
    if int(values.get("split.count", 1)) > 1:
        command = f"llama-gguf-split --merge {file} whole.gguf"
        raise ModelError(f"{file} is one of {values['split.count']} parts; join them first: {command}")
    return GGUFHeader(values, tensors)


def _unpack(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    """Read numbers of the kinds that `layout` names in struct's letters."""
    return struct.unpack(f"<{layout}", _exactly(stream, struct.calcsize(f"<{layout}")))


def _exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    """Read as many bytes. Raises EOFError if the file has fewer left."""
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError(f"the file ends {num_bytes - len(data)} bytes early")
    return data


def _string(stream: BinaryIO) -> str:
    return _exactly(stream, *_unpack(stream, "Q")).decode()


def _value(stream: BinaryIO, kind: int) -> str | int | float | bool | None:
    """Read the next value; an array is skipped, and None is returned for it."""
    if kind == STRING:
        return _string(stream)
    if kind != ARRAY:
        return _unpack(stream, SCALARS[kind])[0]
    item_kind, length = _unpack(stream, "IQ")
    if item_kind in SCALARS:
        stream.seek(length * struct.calcsize(f"<{SCALARS[item_kind]}"), io.SEEK_CUR)
    else:
        for _ in range(length):
            _value(stream, item_kind)
    return None


def _tensor_name(stream: BinaryIO) -> str:
    """Read the next tensor's description, and return its name."""
    name = _string(stream)
    (num_dims,) = _unpack(stream, "I")
    _unpack(stream, f"{num_dims}QIQ")
    return name
