"""Read files of JSON lines, JSON lists, CSV and text row by row.

Each row is parsed by itself, so a broken one spoils no other row, changes no other row's types, and is reported by its
line. `records` only splits the file into rows and `parse` reads one, so rows can be counted or skipped without the cost
of parsing. A file is never held in memory, except for a text that is one row.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from finetuner.errors import DataError

Row = Mapping[str, Any]
FileKind = Literal["json", "csv", "text", "document"]  # text: a row for each line; document: one row for the file
Opener = Callable[[], IO[bytes]]

GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20
_MAX_CELL_CHARACTERS = (1 << 31) - 1  # csv refuses cells above 128 KiB unless told otherwise


class RawRecord(NamedTuple):
    """One row as it is split off its file.

    `line`: from 1; 0 in a JSON list. `value`: bytes of a line or file, (names, cells) of CSV, or an element of a JSON
    list. `escaped`: the value may hold an unpaired surrogate, since the file spells one.
    """

    line: int
    value: Any
    escaped: bool = False


@dataclass(frozen=True)
class RowFile:
    """One file of rows. `open_bytes` opens it from its start each time, decompressed if it is gzip."""

    name: str
    kind: FileKind
    open_bytes: Opener

    def records(self) -> Iterator[RawRecord]:
        """Yield every row, unparsed. Raises DataError where the rows that follow cannot be told apart."""
        with self.open_bytes() as file:
            if self.kind == "csv":
                yield from _csv_records(file)
            elif self.kind == "document":
                yield RawRecord(1, file.read().removeprefix(BOM))
            elif self.kind == "json" and _is_json_list(file):
                yield from _list_records(file)
            else:
                yield from _lines(file, blank=self.kind == "text")

    def parse(self, record: RawRecord) -> Row:
        """Return the row of a record. Raises DataError if it is broken."""
        if self.kind == "csv":
            return _csv_row(record)
        if self.kind == "text":
            return {"text": _decode_line(record)}
        if self.kind == "document":
            return {"text": _decode_utf8(record)}
        return _json_row(record)

    def count(self) -> int:
        """Rows of the file, broken ones included."""
        return sum(1 for _ in self.records())


def local_file(path: Path, kind: FileKind) -> RowFile:
    """Return the RowFile of a file on this disk, which may be gzipped."""

    def open_bytes() -> IO[bytes]:
        with path.open("rb") as file:
            is_gzip = file.read(2) == GZIP
        return gzip.open(path) if is_gzip else path.open("rb", buffering=READ_BYTES)  # type: ignore[return-value]

    return RowFile(str(path), kind, open_bytes)


def _is_json_list(file: IO[bytes]) -> bool:
    """Return whether the first character opens a list, without consuming it: the file may be a connection."""
    head: bytes = file.peek(4096)  # type: ignore[attr-defined]
    return head.removeprefix(BOM).lstrip().startswith(b"[")


def _lines(file: IO[bytes], *, blank: bool) -> Iterator[RawRecord]:
    """Yield the lines of a file; blank ones only if `blank`."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if blank or not line.isspace():
            yield RawRecord(number, line)


def _decode_line(record: RawRecord) -> str:
    """Return the text of a line, without its line break."""
    return _decode_utf8(record).rstrip("\r\n")


def _decode_utf8(record: RawRecord) -> str:
    try:
        text: str = record.value.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = record.value[error.start]
        raise DataError(f"line {record.line} is not UTF-8 text: byte 0x{byte:02x} at {error.start}") from None
    return text


def _json_row(record: RawRecord) -> Row:
    value, escaped = record.value, record.escaped
    if isinstance(value, bytes):
        text = _decode_line(record)
        if text.strip() == "{":
            raise DataError(
                f"line {record.line} begins an object that goes over several lines. Rows are objects of one line each, "
                "or the elements of one list: [...]"
            )
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"line {record.line} is broken JSON: {_json_error_text(error)}") from None
        escaped = _spells_surrogates(text)
    where = f"line {record.line}" if record.line else "it"
    if escaped:
        _require_no_surrogates(value, where)
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {type(value).__name__} {value!r:.60}, but must be an object: {{...}}")
    return value


def _json_error_text(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "brackets nested too deep"
    return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.colno}"


def _spells_surrogates(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _require_no_surrogates(value: Any, where: str) -> None:
    """Raise DataError if a text of the value has an unpaired surrogate: JSON can spell it (\\ud800), UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"{where} has half a character, \\u{half:04x}, which is not text") from None


def _list_records(file: IO[bytes]) -> Iterator[RawRecord]:
    """Yield the elements of one JSON list, decoded as they are read."""
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        yield from _elements(text)


def _elements(text: io.TextIOWrapper) -> Iterator[RawRecord]:
    decoder = json.JSONDecoder()
    buffer, ended, count = _read_more(text, READ_BYTES, 0).lstrip(), False, 0
    at = 1  # after the bracket
    while True:
        at = _skip_blanks(buffer, at)
        if buffer[at : at + 1] == "]":
            return
        if count and buffer[at : at + 1] == ",":
            at = _skip_blanks(buffer, at + 1)
        try:
            value, stop = decoder.raw_decode(buffer, at)
            rest = _skip_blanks(buffer, stop)
            if rest == len(buffer) or buffer[rest] not in ",]":  # 12 may be the start of 123
                raise json.JSONDecodeError("Expecting ',' or ']'", buffer, rest)
        except json.JSONDecodeError as error:
            # An element that reaches the end of the buffer is broken only if the file ends there too.
            cut_off = error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated string")
            if ended or not cut_off:
                raise _broken_list(error, count) from None
            more = _read_more(text, max(READ_BYTES, len(buffer) - at), count)
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        except RecursionError:
            raise DataError(f"row {count} is broken JSON: brackets nested too deep") from None
        yield RawRecord(0, value, _spells_surrogates(buffer[at:stop]))
        count += 1
        at = rest


def _broken_list(error: json.JSONDecodeError, count: int) -> DataError:
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return DataError(
        f"row {count} is broken JSON: {error.msg[:1].lower()}{error.msg[1:]} near {near!r}.\n"
        "The rows of a list cannot be told apart after that. Fix it, or write one object a line (JSON lines)"
    )


def _read_more(text: io.TextIOWrapper, size: int, count: int) -> str:
    try:
        return text.read(size)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"in or after row {count}, the file is not UTF-8 text: byte 0x{byte:02x}") from None


_BLANKS = re.compile(r"[ \t\r\n]*")


def _skip_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def _csv_records(file: IO[bytes]) -> Iterator[RawRecord]:
    """Yield (names of the first line, cells) for each further row; a quoted cell may contain line breaks."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    # Bytes that are not UTF-8 become unpaired surrogates, so that only their own row is refused, in _csv_row.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines)
        try:
            names = next(reader, None)
            yield from (RawRecord(reader.line_num, (names, cells)) for cells in reader if cells)
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} is no CSV: {error}") from None


def _csv_row(record: RawRecord) -> Row:
    names, cells = record.value
    if len(cells) != len(names):
        raise DataError(
            f"line {record.line} has {len(cells)} fields, and the first line {len(names)} names. "
            "Quote the texts with commas"
        )
    row = dict(zip(names, cells, strict=True))
    for name, text in row.items():
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                byte = ord(text[error.start]) & 0xFF
                raise DataError(f"line {record.line} is not UTF-8 text: byte 0x{byte:02x} in column '{name}'") from None
    return row
