"""One row as it is split off its file, before it is parsed."""

from typing import Any, NamedTuple

from finetuner.errors import DataError, RowEncodingError

BOM = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20


class RawRecord(NamedTuple):
    """One row as it is split off its file.

    `line`: from 1; 0 in a JSON list. `value`: bytes of a line or file, (names, cells) of CSV, or a decoded JSON value.
    `escaped`: a decoded value may hold an unpaired surrogate, since the file spells one.
    """

    line: int
    value: Any
    escaped: bool = False


def decode_line(record: RawRecord) -> str:
    """Return the text of a line, without its line break. Raises DataError if it is not UTF-8."""
    return decode_utf8(record).rstrip("\r\n")


def decode_utf8(record: RawRecord) -> str:
    """Return the text of a line or file. Raises DataError if it is not UTF-8."""
    try:
        text: str = record.value.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = record.value[error.start]
        where = f"line {record.line} is not UTF-8 text: byte 0x{byte:02x} at {error.start}"
        raise encoding_error(where, record.value, error.start) from None
    return text


def encoding_error(where: str, data: bytes, at: int) -> DataError:
    """Return the error of bytes that are not UTF-8, the first of them at `at`.

    A RowEncodingError if they read as a text in the Windows encoding: to skip such rows is to lose every row with an
    accent or a curly quote.
    """
    around = data[max(0, at - 20) : at + 20]
    try:
        text = around.decode("cp1252")
    except UnicodeDecodeError:
        return DataError(where)
    odd = [character for character in text if not character.isascii()]
    is_text = len(odd) * 2 <= len(text) and all(c.isprintable() or c.isspace() for c in text)
    if not is_text or b"\xc3" in around or b"\xe2\x80" in around:  # pieces of UTF-8 that was cut or mixed
        return DataError(where)
    return RowEncodingError(
        f"{where}. In the Windows encoding cp1252 (Latin-1) it reads {text!r}.\n"
        "If that is right, write the file anew as UTF-8: iconv -f CP1252 -t UTF-8 FILE > NEW"
    )
