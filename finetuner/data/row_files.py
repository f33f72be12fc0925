"""Files of JSON lines, JSON lists, CSV and text, row by row: each row is its own, so that one that is broken spoils no
other, takes no other's type, and is found again by its line.

A file is never held in memory, but for a text that is one row. `records` cuts it and `parse` reads a cut, so that rows
can be counted or passed over without the cost of reading them.
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
Kind = Literal["json", "csv", "text", "document"]  # text: line by line; document: a text as a whole
Opener = Callable[[], IO[bytes]]

GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 20
_LONGEST_CELL = (1 << 31) - 1  # csv refuses cells above 128 KiB unless told otherwise


class Record(NamedTuple):
    """A row that is not read yet: its line, from 1 (0 where a file has none), and its bytes, cells or JSON value.
    `escaped`: the value may hold half a character."""

    line: int
    value: Any
    escaped: bool = False


@dataclass(frozen=True)
class RowFile:
    """One file. `open_bytes` gives its bytes anew each time, unpacked if they were gzip."""

    name: str
    kind: Kind
    open_bytes: Opener

    def records(self) -> Iterator[Record]:
        """Every row, unread. Raises DataError where what follows cannot be told apart any more."""
        with self.open_bytes() as file:
            if self.kind == "csv":
                yield from _csv_records(file)
            elif self.kind == "document":
                yield Record(1, file.read().removeprefix(BOM))
            elif self.kind == "json" and _begins_with_bracket(file):
                yield from _list_records(file)
            else:
                yield from _lines(file, blank=self.kind == "text")

    def parse(self, record: Record) -> Row:
        """Raises DataError if the record is no row."""
        if self.kind == "csv":
            return _csv_row(record)
        if self.kind == "text":
            return {"text": _decoded(record)}
        if self.kind == "document":
            return {"text": _as_utf8(record)}
        return _json_row(record)

    def count(self) -> int:
        """Rows of the file."""
        return sum(1 for _ in self.records())


def local_file(path: Path, kind: Kind) -> RowFile:
    """A file on this disk."""

    def open_bytes() -> IO[bytes]:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
        return gzip.open(path) if packed else path.open("rb", buffering=CHUNK)  # type: ignore[return-value]

    return RowFile(str(path), kind, open_bytes)


def _begins_with_bracket(file: IO[bytes]) -> bool:
    """Whether the first character is that of a list. Nothing is taken from the file, which may be a connection."""
    head: bytes = file.peek(4096)  # type: ignore[attr-defined]
    return head.removeprefix(BOM).lstrip().startswith(b"[")


def _lines(file: IO[bytes], *, blank: bool) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if blank or not line.isspace():
            yield Record(number, line)


def _decoded(record: Record) -> str:
    """The text of a line, without its end."""
    return _as_utf8(record).rstrip("\r\n")


def _as_utf8(record: Record) -> str:
    try:
        text: str = record.value.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = record.value[error.start]
        raise DataError(f"line {record.line} is not UTF-8 text: byte 0x{byte:02x} at {error.start}") from None
    return text


def _json_row(record: Record) -> Row:
    value, escaped = record.value, record.escaped
    if isinstance(value, bytes):
        text = _decoded(record)
        if text.strip() == "{":
            raise DataError(
                f"line {record.line} begins an object that goes over several lines. Rows are objects of one line each, "
                "or the elements of one list: [...]"
            )
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"line {record.line} is broken JSON: {_json_complaint(error)}") from None
        escaped = _spells_half_characters(text)
    where = f"line {record.line}" if record.line else "it"
    if escaped:
        _require_whole_characters(value, where)
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {type(value).__name__} {value!r:.60}, but must be an object: {{...}}")
    return value


def _json_complaint(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "brackets nested too deep"
    return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.colno}"


def _spells_half_characters(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _require_whole_characters(value: Any, where: str) -> None:
    """JSON can spell half a character (\\ud800), which is in no text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"{where} has half a character, \\u{half:04x}, which is not text") from None


def _list_records(file: IO[bytes]) -> Iterator[Record]:
    """The elements of one JSON list, each decoded as it comes into reach."""
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        yield from _elements(text)


def _elements(text: io.TextIOWrapper) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    buffer, ended, count = _read_more(text, CHUNK, 0).lstrip(), False, 0
    at = 1  # behind the bracket
    while True:
        at = _skip_blanks(buffer, at)
        if buffer[at : at + 1] == "]":
            return
        if count and buffer[at : at + 1] == ",":
            at = _skip_blanks(buffer, at + 1)
        try:
            value, stop = decoder.raw_decode(buffer, at)
            rest = _skip_blanks(buffer, stop)
            if rest == len(buffer) or buffer[rest] not in ",]":  # nor is a number whole before something follows it
                raise json.JSONDecodeError("Expecting ',' or ']'", buffer, rest)
        except json.JSONDecodeError as error:
            # What is cut off by the end of the buffer is broken only if the file ends there too.
            cut_off = error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated string")
            if ended or not cut_off:
                raise _broken_list(error, count) from None
            more = _read_more(text, max(CHUNK, len(buffer) - at), count)
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        except RecursionError:
            raise DataError(f"row {count} is broken JSON: brackets nested too deep") from None
        yield Record(0, value, _spells_half_characters(buffer[at:stop]))
        count += 1
        at = rest


def _broken_list(error: json.JSONDecodeError, count: int) -> DataError:
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return DataError(
        f"row {count} is broken JSON: {error.msg[:1].lower()}{error.msg[1:]} near {near!r}.\n"
        "The rows of a list cannot be told apart behind that. Mend it, or write one object a line (JSON lines)"
    )


def _read_more(text: io.TextIOWrapper, size: int, count: int) -> str:
    try:
        return text.read(size)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"in or behind row {count}, the file is not UTF-8 text: byte 0x{byte:02x}") from None


_BLANKS = re.compile(r"[ \t\r\n]*")


def _skip_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def _csv_records(file: IO[bytes]) -> Iterator[Record]:
    """(names of the first line, cells) of each further row. A cell may have lines of its own."""
    csv.field_size_limit(_LONGEST_CELL)
    # Bytes that are not UTF-8 come through as half characters, so that they are the fault of their own row.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines)
        try:
            names = next(reader, None)
            yield from (Record(reader.line_num, (names, cells)) for cells in reader if cells)
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} is no CSV: {error}") from None


def _csv_row(record: Record) -> Row:
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
