"""Open files of rows as bytes, unpacked if their first bytes say that they are packed.

gzip, bzip2, xz, Zstandard, LZ4 and zip. Nothing behind the end of a packed file is passed over: packed files one after
the other are read as one, and other bytes are an error.
"""

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from finetuner.data.file_heads import HEAD_BYTES
from finetuner.data.raw_records import READ_BYTES
from finetuner.errors import RowFileError
from finetuner.recipe.rules import DATA_SUFFIXES, data_suffix

_GZIP = b"\x1f\x8b"
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_XZ = b"\xfd7zXZ\x00"
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # the second: a frame to be skipped
_LZ4 = b"\x04\x22\x4d\x18"
_ZIP = b"PK\x03\x04"
_BAD_PACKING = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile)
_HIDDEN = re.compile(r"(?:^|/)[._]")  # files that systems add, such as __MACOSX/._rows.json


def open_unpacked(path: Path) -> IO[bytes]:
    """Open a file on this disk from its start. Raises RowFileError for a zip archive: see zip_members."""
    return unpacked(path.open("rb", buffering=READ_BYTES))


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file on this disk, unpacked."""
    with packing_errors(), open_unpacked(path) as file:
        head: bytes = file.peek(HEAD_BYTES)[:HEAD_BYTES]  # type: ignore[attr-defined]
        return head


def unpacked(file: Any) -> IO[bytes]:
    """Return the buffered file, or a stream of what is packed in it. It is read once, forwards."""
    head = file.peek(16)[:16]
    if head.startswith(_GZIP):
        return _buffered(gzip.GzipFile(fileobj=file), file)
    if _BZIP2.match(head):
        return _buffered(_Unpacker(file, bz2.BZ2Decompressor), file)
    if head.startswith(_XZ):
        return _buffered(_Unpacker(file, lzma.LZMADecompressor, padding=b"\x00"), file)
    if _ZSTD.match(head) or head.startswith(_LZ4):
        return _buffered(_arrow_stream(file, "lz4" if head.startswith(_LZ4) else "zstd"), file)
    if head.startswith(_ZIP):
        file.close()
        raise RowFileError("a zip archive is read from this disk only.\nUnpack it, or write `streaming: false`")
    return cast("IO[bytes]", file)


def from_connection(raw: Any) -> IO[bytes]:
    """Return what comes through a connection, unpacked; its reads may return fewer bytes than are asked for."""
    return unpacked(_buffered(raw))


@contextmanager
def packing_errors() -> Iterator[None]:
    """Raise RowFileError where a packed file is cut off or damaged."""
    try:
        yield
    except _BAD_PACKING as error:
        raise RowFileError(_bad_packing(error)) from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of a library that unpacks
            raise
        raise RowFileError(_bad_packing(error)) from error


def _bad_packing(error: Exception) -> str:
    return f"it is packed, and cut off or damaged ({error}).\nFetch it again, or unpack it by hand and look at its end"


def zip_members(path: Path) -> list[str]:
    """Names of the files in a zip archive, without those that systems add. Raises RowFileError if it has none."""
    with packing_errors(), zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if any(info.flag_bits & 1 for info in archive.infolist()):
            raise RowFileError("it is a zip archive with a password.\nUnpack it by hand")
    if "xl/workbook.xml" in names or "word/document.xml" in names:
        raise RowFileError("it is an Excel or Word file.\nSave it as CSV (UTF-8)")
    shown = [name for name in names if not _HIDDEN.search(name)]
    data = [name for name in shown if name.lower().endswith(DATA_SUFFIXES)] or shown
    if not data:
        raise RowFileError("it is a zip archive without a file in it")
    kinds = {data_suffix(name) for name in data}
    if len(kinds) > 1:
        raise RowFileError(
            f"it is a zip archive of several kinds of files: {', '.join(data[:5])}{', ...' * (len(data) > 5)}.\n"
            "Unpack it, and name those to read"
        )
    return sorted(data)


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == _ZIP


def open_zip_member(path: Path, name: str) -> IO[bytes]:
    """Open one file of a zip archive, unpacked."""
    with packing_errors(), zipfile.ZipFile(path) as archive:  # the member stays open when the archive is closed
        return unpacked(_buffered(archive.open(name)))


def _buffered(raw: Any, *below: Any) -> IO[bytes]:
    """Return a stream that can be looked into before it is read; closing it closes `raw` and those below it."""
    return cast("IO[bytes]", io.BufferedReader(_FullReads(raw, *below), READ_BYTES))


def _arrow_stream(file: Any, codec: str) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), codec)


class _FullReads(io.RawIOBase):
    """A stream whose reads return all bytes that are asked for, so that a head can be looked at."""

    def __init__(self, raw: Any, *below: Any) -> None:
        self.raw, self.below = raw, below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view):
            count = self.raw.readinto(view[filled:])
            if not count:
                break
            filled += count
        return filled

    def close(self) -> None:
        for one in (self.raw, *self.below):
            one.close()
        super().close()


class _Unpacker(io.RawIOBase):
    """The unpacked bytes of streams that stand one after the other in a file, for Python's decompressors."""

    def __init__(self, file: IO[bytes], make: Callable[[], Any], padding: bytes = b"") -> None:
        """`padding`: the byte that may stand between streams."""
        self.file, self.make, self.padding = file, make, padding
        self.decompressor: Any = make()
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.decompressor.eof:
                self.rest = self.decompressor.unused_data or self.file.read(READ_BYTES)
                while self.rest and not self.rest.lstrip(self.padding):
                    self.rest = self.file.read(READ_BYTES)
                if not self.rest:
                    return 0
                self.rest = self.rest.lstrip(self.padding) if self.padding else self.rest
                self.decompressor = self.make()
            if self.decompressor.needs_input and not self.rest:
                self.rest = self.file.read(READ_BYTES)
                if not self.rest:
                    raise EOFError("it ends before its end-of-stream mark")
            data = self.decompressor.decompress(self.rest, len(buffer))
            self.rest = b""
            if data:
                buffer[: len(data)] = data
                return len(data)
