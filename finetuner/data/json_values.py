"""Decode JSON values that stand one after the other in a file: lists whose elements are rows, and objects."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from finetuner.data.raw_records import READ_BYTES, RawRecord
from finetuner.errors import RowFileError

_BLANKS = re.compile(r"[ \t\r\n]*")
_BLANKS_AND_MARKS = re.compile("[ \t\r\n\ufeff]*")  # files with a byte order mark that were joined


class RepeatedKeyError(ValueError):
    """A key stands twice in one object, of which Python's parser would keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True)
class MessageLists:
    """Tells the lists that are one conversation from those that hold rows: their elements are messages.

    column: the row's column that such a list becomes. keys: those of which a message has one.
    """

    column: str
    keys: frozenset[str]

    def hold(self, element: Any) -> bool:
        """Return whether an element of a list is a message."""
        return isinstance(element, dict) and self.column not in element and not self.keys.isdisjoint(element)


def spells_surrogates(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


@dataclass
class Values:
    """JSON values one after the other, decoded as they are read. `chunks`: the bytes from line `line` of a file on."""

    chunks: Iterator[bytes]
    line: int  # of the buffer's first character
    messages: MessageLists | None
    buffer: str = ""
    at: int = 0
    ended: bool = False
    num_rows: int = 0
    utf8: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    def records(self) -> Iterator[RawRecord]:
        """Yield the rows. Raises RowFileError where the rows that follow cannot be told apart."""
        num_values, behind = 0, ""
        while opening := self._next_character():
            if opening == "[":
                yield from self._rows_of_list(is_first=num_values == 0)
                behind = "list"
            elif opening == "{":
                yield self._counted(self._value())
                behind = "object"
            elif opening == "," and behind == "object":  # a comma behind each row
                self.at += 1
                continue
            else:
                raise self._stray(behind)
            num_values += 1

    def _rows_of_list(self, *, is_first: bool) -> Iterator[RawRecord]:
        """Yield the elements of a list, or one row if they are messages."""
        elements = self._elements()
        first = next(elements, None)
        if self.messages is None:
            yield from map(self._counted, chain([] if first is None else [first], elements))
        elif first is None:
            if not (is_first and self._next_character() == ""):  # [] alone is a file without rows
                yield self._counted(RawRecord(0, []))
        elif self.messages.hold(first.value):
            found = [first, *elements]
            yield self._counted(RawRecord(0, [one.value for one in found], any(one.escaped for one in found)))
        else:
            yield from map(self._counted, chain([first], elements))

    def _counted(self, record: RawRecord) -> RawRecord:
        self.num_rows += 1
        return record

    def _elements(self) -> Iterator[RawRecord]:
        self.at += 1  # the bracket
        while (character := self._next_character()) != "]":
            if not character:
                raise RowFileError(
                    f"its list ends without a closing ']', behind row {self.num_rows - 1}: was the file cut off?\n"
                    "Fetch or write it again, or close the list"
                )
            yield self._value(",]")
            if self._next_character() == ",":
                self.at += 1
        self.at += 1

    def _next_character(self) -> str:
        """Return the next character that is not blank; "" at the end of the file."""
        while True:
            match = _BLANKS_AND_MARKS.match(self.buffer, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.buffer) or not self._read_more():
                return self.buffer[self.at : self.at + 1]

    def _value(self, expected: str = "") -> RawRecord:
        """Return the next value. `expected`: characters of which one must follow it."""
        while True:
            try:
                value, stop = DECODER.raw_decode(self.buffer, self.at)
                rest = _skip_blanks(self.buffer, stop)
                if expected and (rest == len(self.buffer) or self.buffer[rest] not in expected):  # 12 may begin 123
                    raise json.JSONDecodeError("Expecting ',' or ']'", self.buffer, rest)
            except json.JSONDecodeError as error:
                # A value that reaches the end of the buffer is broken only if the file ends there too.
                cut_off = error.pos >= len(self.buffer) - 16 or error.msg.startswith("Unterminated string")
                if not cut_off or not self._read_more():
                    raise self._broken(error) from None
            except RecursionError:
                raise RowFileError(f"row {self.num_rows} is broken JSON: brackets nested too deep") from None
            except RepeatedKeyError as error:
                raise RowFileError(f"row {self.num_rows} has the key '{error}' twice in one object") from None
            except ValueError as error:  # a number of more than 4,300 digits
                raise RowFileError(f"row {self.num_rows} is broken JSON: {error}") from None
            else:
                record = RawRecord(0, value, spells_surrogates(self.buffer[self.at : stop]))
                self.at = stop
                return record

    def _read_more(self) -> bool:
        """Read on, and forget what lies before the place that was reached. False at the end of the file."""
        if self.ended:
            return False
        self.line += self.buffer.count("\n", 0, self.at)
        pieces, size, wanted = [], 0, max(READ_BYTES, len(self.buffer) - self.at)
        try:
            while size < wanted:
                chunk = next(self.chunks, None)
                if chunk is None:
                    self.ended = True
                pieces.append(self.utf8.decode(chunk or b"", final=self.ended))
                size += len(pieces[-1])
                if self.ended:
                    break
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise RowFileError(
                f"in or after row {self.num_rows}, the file is not UTF-8 text: byte 0x{byte:02x}.\n"
                "Write it anew, for example from the Windows encoding: iconv -f CP1252 -t UTF-8 FILE > NEW"
            ) from None
        self.buffer, self.at = self.buffer[self.at :] + "".join(pieces), 0
        return size > 0

    def _place(self, at: int) -> str:
        return f"line {self.line + self.buffer.count(chr(10), 0, at)}"

    def _broken(self, error: json.JSONDecodeError) -> RowFileError:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        is_end = self.ended and error.pos >= len(error.doc.rstrip())
        return RowFileError(
            f"row {self.num_rows} is broken JSON: {error.msg[:1].lower()}{error.msg[1:]} near {near!r} "
            f"({self._place(error.pos)}{', where the file ends: was it cut off?' * is_end}).\n"
            "The rows of a list cannot be told apart after that. Fix it, or write one object a line (JSON lines)"
        )

    def _stray(self, behind: str) -> RowFileError:
        text = self.buffer[self.at : self.at + 40]
        what = f"behind the {behind} of row {max(0, self.num_rows - 1)}, " if behind else ""
        hint = " (zero bytes: the file was cut off by a crash)" if text.startswith("\x00") else ""
        return RowFileError(
            f"{what}{self._place(self.at)} goes on with {text!r}, which is no row{hint}.\n"
            "Remove it. Rows are objects of one line each, or the elements of lists"
        )


def _skip_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at
