"""Split CSV and other tables of text into rows: commas, semicolons, tabs or bars, as the first line has them."""

import csv
import io
from collections.abc import Iterator
from typing import IO, Any

from finetuner.data.raw_records import RawRecord, encoding_error
from finetuner.errors import DataError, RowFileError

_MAX_CELL_CHARACTERS = (1 << 31) - 1  # csv refuses cells above 128 KiB unless told otherwise
_DELIMITERS = ",;\t|"
_WORDS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_records(file: IO[bytes], *, tabs: bool) -> Iterator[RawRecord]:
    """Yield (names of the first line, cells) for each further row; a quoted cell may contain line breaks.

    `tabs`: where the first line leaves it open, cells are separated by tabs. Raises RowFileError if the file is no
    table, or names a column twice.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    # Bytes that are not UTF-8 become unpaired surrogates, so that only their own row is refused, in csv_row.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        head = lines.readline()
        told = head.strip().lower()
        before = 0
        if told.startswith("sep=") and len(told) <= 5:  # Excel's first line
            delimiter, head, before = head.strip()[4:5] or "\t", lines.readline(), 1
        else:
            delimiter = _delimiter(head, tabs=tabs)
        reader = csv.reader(_after(head, lines), delimiter=delimiter, strict=True)
        try:
            names = next(reader, None)
            if names is not None:
                _require_names(names, delimiter)
            table = (tuple(names or ()), delimiter)
            yield from (RawRecord(reader.line_num + before, (table, cells)) for cells in reader if cells)
        except csv.Error as error:
            raise RowFileError(
                f"line {reader.line_num + before} is no CSV: {error}.\n"
                'A text that holds a quote or a line break stands in quotes, and its quotes are doubled: "say ""so"""'
            ) from None


def csv_row(record: RawRecord) -> dict[str, Any]:
    """Return the row of a record. Raises DataError if it is broken."""
    (names, delimiter), cells = record.value
    if len(cells) != len(names):
        raise DataError(
            f"line {record.line} has {len(cells)} fields, and the first line {len(names)} names. "
            f"Quote the texts with {_WORDS.get(delimiter, repr(delimiter))}"
        )
    if cells[-1] == names[-1] and (cells[0].removeprefix("\ufeff"), *cells[1:]) == names:
        raise DataError(f"line {record.line} repeats the names of the first line (were files joined?). Remove it")
    row = dict(zip(names, cells, strict=True))
    if names.count("") > 1:
        del row[""]
        if any(cell.strip() for name, cell in zip(names, cells, strict=True) if not name):
            raise DataError(f"line {record.line} has text in a column without a name. Name it in the first line")
    for name, text in row.items():
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                byte = ord(text[error.start]) & 0xFF
                where = f"line {record.line} is not UTF-8 text: byte 0x{byte:02x} in column '{name}'"
                data = text.encode("utf-8", "surrogateescape")
                raise encoding_error(where, data, len(text[: error.start].encode("utf-8"))) from None
    return row


def _after(head: str, lines: io.TextIOWrapper) -> Iterator[str]:
    yield head
    yield from lines


def _delimiter(head: str, *, tabs: bool) -> str:
    """Return what separates the names of the first line: of equal ones a comma, or a tab with `tabs`."""
    order = "\t,;|" if tabs else _DELIMITERS
    counts = {one: len(next(csv.reader([head], delimiter=one), [])) for one in order}
    return max(counts, key=lambda one: counts[one])


def _require_names(names: list[str], delimiter: str) -> None:
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        places = [str(i) for i, name in enumerate(names, 1) if name == twice[0]]
        raise RowFileError(
            f"its first line names the column '{twice[0]}' more than once (columns {', '.join(places)}), so that a "
            "row would have several texts of that name.\nRename or remove one"
        )
    if not any(name.strip() for name in names):
        raise RowFileError("its first line has no name of a column.\nThe first line of a CSV file names the columns")
    if names[0].lstrip()[:1] in ("{", "["):
        raise RowFileError(f"it begins with {names[0]!r:.40}: JSON, and no CSV.\nWrite `ds_type: json`")
