"""Read files of JSON, CSV and text row by row.

Each row is parsed by itself, so a broken one spoils no other row, changes no other row's types, and is reported by its
line. `records` only splits the file into rows and `parse` reads one, so rows can be counted or skipped without the cost
of parsing. A file is never held in memory, except for a text that is one row.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from finetuner.data.csv_rows import csv_records, csv_row
from finetuner.data.file_heads import HEAD_BYTES, require_rows
from finetuner.data.json_rows import json_records, json_row
from finetuner.data.json_values import MessageLists
from finetuner.data.raw_records import BOM, READ_BYTES, RawRecord, decode_line, decode_utf8
from finetuner.data.unpacking import is_zip, open_unpacked, open_zip_member, packing_errors, zip_members
from finetuner.errors import RowFileError
from finetuner.recipe.rules import data_suffix

Row = Mapping[str, Any]
FileKind = Literal["json", "csv", "text", "document"]  # text: a row for each line; document: one row for the file
Opener = Callable[[], IO[bytes]]

_ANY_LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class RowFile:
    """One file of rows.

    `open_bytes` opens it from its start each time, unpacked. `messages`: which lists of JSON are one conversation and
    not a list of rows; None: none is.
    """

    name: str
    kind: FileKind
    open_bytes: Opener
    messages: MessageLists | None = None

    def records(self) -> Iterator[RawRecord]:
        """Yield every row, unparsed. Raises RowFileError where the rows that follow cannot be told apart."""
        try:
            with packing_errors():
                yield from self._records()
        except RowFileError as error:
            raise self._named(error) from error

    def _records(self) -> Iterator[RawRecord]:
        with self.open_bytes() as file:
            head: bytes = file.peek(READ_BYTES)  # type: ignore[attr-defined]
            require_rows(head[:HEAD_BYTES], may_be_page=self.kind in ("text", "document"))
            if self.kind == "csv":
                yield from csv_records(file, tabs=data_suffix(self.name) == ".tsv")
            elif self.kind == "document":
                yield RawRecord(1, file.read().removeprefix(BOM))
            elif self.kind == "json":
                yield from json_records(file, _lines(file, head), self.messages)
            else:
                for number, line in enumerate(_lines(file, head), 1):
                    yield RawRecord(number, line.removeprefix(BOM) if number == 1 else line)

    def parse(self, record: RawRecord) -> Row:
        """Return the row of a record. Raises DataError if it is broken, RowFileError if it holds several rows."""
        if self.kind == "csv":
            return csv_row(record)
        if self.kind == "text":
            return {"text": decode_line(record)}
        if self.kind == "document":
            return {"text": decode_utf8(record)}
        try:
            return json_row(record, self.messages)
        except RowFileError as error:
            raise self._named(error) from None

    def count(self) -> int:
        """Rows of the file, broken ones included."""
        return sum(1 for _ in self.records())

    def _named(self, error: RowFileError) -> RowFileError:
        what, line_break, advice = str(error).partition("\n")
        return RowFileError(f"{self.name}: {what}{line_break}{advice.replace(' FILE', f' {shlex.quote(self.name)}')}.")


def local_file(path: Path, kind: FileKind, messages: MessageLists | None = None) -> RowFile:
    """Return the RowFile of a file on this disk, which may be packed, but not a zip archive."""
    return RowFile(str(path), kind, partial(open_unpacked, path), messages)


def local_files(path: Path, kind: FileKind, messages: MessageLists | None = None) -> tuple[RowFile, ...]:
    """Return the RowFile of a file on this disk, or those of a zip archive."""
    if not is_zip(path):
        return (local_file(path, kind, messages),)
    return tuple(
        RowFile(f"{path}/{name}", kind, partial(open_zip_member, path, name), messages) for name in zip_members(path)
    )


def _lines(file: IO[bytes], head: bytes) -> Iterator[bytes]:
    r"""Return the lines of a file; those of old Macs end with \r alone. `head`: its first bytes."""
    if b"\n" in head or b"\r" not in head[:-1]:
        return iter(file)
    return _carriage_return_lines(file)


def _carriage_return_lines(file: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(READ_BYTES):
        chunk = rest + chunk
        held = chunk.endswith(b"\r")  # perhaps of \r\n
        *lines, rest = _ANY_LINE_END.split(chunk[:-1] if held else chunk)
        rest += b"\r" * held
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest.removesuffix(b"\r")
