"""Split files of JSON into rows, and parse a row.

A file is lines of objects, which are split off unparsed, or values one after the other: lists whose elements are rows,
and objects of one line or several. Both may stand in one file, as `cat` makes them. Bytes that are neither a row nor
part of one are an error that names their place, so that no row behind them is lost.
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Any

from finetuner.data.json_values import DECODER, MessageLists, RepeatedKeyError, Values, spells_surrogates
from finetuner.data.raw_records import BOM, READ_BYTES, RawRecord, decode_line
from finetuner.errors import DataError, RowFileError

_MAX_SPREAD_BYTES = 64 << 20  # of an object that is written over several lines
_LIST_BEGINS = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*\[")
_ROWS_IN_LIST = re.compile(rb"\[[ \t\r\n]*(?:[\[{]|$)")  # "[ERROR]" begins none
_VALUES_TOUCH = re.compile(r'[}\]][ \t\r\n\ufeff]*\[?[{\[][ \t]*"')  # one value ends and the next begins
_BLANKS_AND_BOM = b" \t\r\n" + BOM
_BETWEEN = " \t\r\n,\ufeff"  # may stand between two values


def json_records(file: IO[bytes], lines: Iterator[bytes], messages: MessageLists | None) -> Iterator[RawRecord]:
    """Yield the rows of a file of JSON. `lines`: its lines, which are read unless it begins with a list."""
    if _begins_with_list(file):
        yield from Values(iter(lambda: file.read(READ_BYTES), b""), 1, messages).records()
        return
    number, looked_at = 0, deque[bytes]()
    is_first, goes_on = True, True
    while goes_on:
        goes_on = False
        for number, line in enumerate(chain(_drained(looked_at), lines), number + 1):  # noqa: B020
            if line[:1] == b"{" and line[-2:] == b"}\n" and not is_first:  # nearly all lines
                yield RawRecord(number, line)
                continue
            text = line.strip(_BLANKS_AND_BOM)
            if not text:
                continue
            if text[:1] == b"{" and text[-1:] == b"}" and not (is_first and _holds_several(text)):
                yield RawRecord(number, text)
            elif text[:1] == b"{" and text[-2:] == b"},":  # a comma behind each row
                yield RawRecord(number, text[:-1])
            elif (chunks := _value_over_lines(number, text, looked_at, lines)) is not None:
                yield from Values(chunks, number, messages).records()
                return
            else:
                yield RawRecord(number, line.removeprefix(BOM))
                is_first, goes_on = False, True
                break  # go on with the lines that were looked at
            is_first = False


def _drained(lines: deque[bytes]) -> Iterator[bytes]:
    while lines:
        yield lines.popleft()


def _value_over_lines(
    number: int, start: bytes, looked_at: deque[bytes], lines: Iterator[bytes]
) -> Iterator[bytes] | None:
    """Return the bytes from line `number` on, which begins with `start`, if a complete JSON value begins there.

    None if it does not: the line is broken, and the next one may be a row; the lines that were read to tell are then in
    `looked_at`. Raises RowFileError if the value goes on for too long to tell.
    """
    if start[:1] not in (b"{", b"["):
        return None
    if start[:1] == b"{" and _completeness(start) == "complete" and not (start[-1:] == b"," or _holds_several(start)):
        return None  # a row, and behind it something that is none
    coming = chain(_drained(looked_at), lines)
    taken, size = [start + b"\n"], len(start)
    while not (state := _completeness(b"".join(taken))) and size <= _MAX_SPREAD_BYTES:
        more = list(islice(coming, len(taken)))
        if not more:
            break
        size += sum(map(len, more))
        taken += more
    if state == "complete" or _ROWS_IN_LIST.match(start):
        return chain([b"".join(taken)], looked_at, lines)
    if not state and size > _MAX_SPREAD_BYTES:
        raise RowFileError(
            f"line {number} begins a value that goes on for more than {_MAX_SPREAD_BYTES >> 20} MiB. "
            "Rows are objects of one line each, or the elements of lists.\n"
            "If the rows lie under a key of it, write them as lines: jq -c '.KEY[]' FILE > NEW"
        )
    looked_at.extendleft(reversed(taken[1:]))
    return None


def json_row(record: RawRecord, messages: MessageLists | None) -> dict[str, Any]:
    """Return the row of a record.

    Raises DataError if it is broken, and RowFileError if there is more than one row in it.
    """
    value, escaped = record.value, record.escaped
    if isinstance(value, bytes):
        text = decode_line(record)
        value = _parsed_line(text, record.line)
        escaped = spells_surrogates(text)
    where = f"line {record.line}" if record.line else "it"
    if escaped:
        _require_no_surrogates(value, where)
    if isinstance(value, list) and messages is not None and value and messages.hold(value[0]):
        return {messages.column: value}
    if not isinstance(value, dict):
        what = "an empty list" if value == [] else f"{type(value).__name__} {value!r:.60}"
        raise DataError(f"{where} holds {what}, but must be an object: {{...}}")
    return value


def _parsed_line(text: str, line: int) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        behind = text[error.pos :] if error.msg.startswith("Extra data") else ""
        if "{" in behind or "[" in behind or _VALUES_TOUCH.search(text):
            raise RowFileError(
                f"line {line} holds more than one value: {_error_text(error)}, near "
                f"{text[max(0, error.pos - 15) : error.pos + 15]!r} "
                "(were files joined that do not end with a line break?).\n"
                "Put each row on a line of its own, as `jq -c . FILE > NEW` does"
            ) from None
        hint = ""
        if "\x00" in text:
            hint = ". It holds bytes that are zero: the file was cut off by a crash, or is no text"
        elif text.lstrip().startswith("{'"):
            hint = ". Texts stand in double quotes in JSON; this looks like a dict that Python printed"
        raise DataError(f"line {line} is broken JSON: {_error_text(error)}{hint}") from None
    except RecursionError:
        raise DataError(f"line {line} is broken JSON: brackets nested too deep") from None
    except RepeatedKeyError as error:
        raise DataError(f"line {line} has the key '{error}' twice in one object") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise DataError(f"line {line} is broken JSON: {error}") from None


def _error_text(error: json.JSONDecodeError) -> str:
    return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.colno}"


def _begins_with_list(file: IO[bytes]) -> bool:
    """Return whether the first character opens a list, without consuming it: the file may be a connection."""
    head: bytes = file.peek(4096)  # type: ignore[attr-defined]
    return _LIST_BEGINS.match(head) is not None


def _require_no_surrogates(value: Any, where: str) -> None:
    """Raise DataError if a text of the value has an unpaired surrogate: JSON can spell it (\\ud800), UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"{where} has half a character, \\u{half:04x}, which is not text") from None


def _holds_several(text: bytes) -> bool:
    """Return whether a line holds several values, of which the first is complete."""
    try:
        decoded = text.decode("utf-8")
        stop = json.JSONDecoder().raw_decode(decoded)[1]
    except (ValueError, RecursionError):
        return False
    return decoded[stop:].lstrip(_BETWEEN)[:1] in ("{", "[")


def _completeness(data: bytes) -> str:
    """Return "complete" if a JSON value begins and ends in the data, "broken" if none can, "" if more is needed."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "broken"
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return "" if error.pos >= len(text.rstrip()) else "broken"
    except (RecursionError, ValueError):
        return "broken"
    return "complete"
