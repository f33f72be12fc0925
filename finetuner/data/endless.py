"""The rows of an entry without an end: read as they are needed, from any place on, and from the start again.

A place is [pass, file, row]. Rows before it are cut and not read, so that going on costs little; files before it are
not opened.
"""

import gzip
import io
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import urlopen

from finetuner.data.fetch import is_address, open_filesystem
from finetuner.data.files import CHUNK, Kind, Row, RowFile
from finetuner.data.sources import (
    ROW_KINDS,
    Placed,
    at_hub,
    kind_of_name,
    parsed,
    row_files,
    rows_of,
    split_name,
    unreadable,
)
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry

Place = list[int]  # [pass, file, row], each from 0
START: Place = [0, 0, 0]
_SECONDS = 60.0  # without a byte


class RowsFrom(Protocol):
    """Files of rows, or what `datasets` reads as one."""

    def __len__(self) -> int: ...

    def from_row(self, file: int, row: int) -> Iterator[Placed]:
        """The rows of a file, from that one on."""


class _Files:
    def __init__(self, files: tuple[RowFile, ...]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def from_row(self, file: int, row: int) -> Iterator[Placed]:
        one = self.files[file]
        for number, record in enumerate(islice(one.records(), row, None), row):
            yield Placed(parsed(one, record), one.name, number)


class _Table:
    """An IterableDataset of the `datasets` library: what is not JSON, CSV or text, and the hub."""

    def __init__(self, entry: DatasetEntry) -> None:
        import datasets

        path = Path(entry.path).expanduser()
        names: Any = list(entry.data_files) if isinstance(entry.data_files, tuple) else entry.data_files
        if path.is_file() or is_address(entry.path):
            place, names = entry.ds_type or kind_of_name(entry, entry.path), {entry.split: entry.path}
        elif entry.ds_type is not None and not path.is_dir():
            place, names = entry.ds_type, {entry.split: at_hub(entry, names)} if names is not None else None
        else:
            place = str(path) if path.is_dir() else entry.path
        self.entry = entry
        self.rows = datasets.load_dataset(
            place, entry.name, data_files=names, split=entry.split, revision=entry.revision, streaming=True
        )

    def __len__(self) -> int:
        return 1

    def from_row(self, file: int, row: int) -> Iterator[Placed]:
        rows = self.rows.skip(row) if row else self.rows
        for number, one in enumerate(rows, row):
            yield Placed(cast("Row", one), self.entry.path, number)


class EndlessRows:
    """Rows of one entry, from a place on; `place` is that of the next row."""

    def __init__(self, entry: DatasetEntry, place: Place, fetched: Path) -> None:
        """Raises DataError if the rows cannot be reached."""
        self.entry, self.place = entry, list(place)
        try:
            self.files = _open(entry, fetched)
        except DataError:
            raise
        except Exception as error:  # the library raises anything
            raise DataError(unreadable(entry, error)) from error
        self.rows = self.files.from_row(self.place[1], self.place[2])
        self.found_any = True  # in this pass; one that begins at the files' end need not

    def take(self, count: int) -> list[tuple[Placed, Place]]:
        """The next rows, and the place behind each; fewer at the end of a pass, when the files start again."""
        taken: list[tuple[Placed, Place]] = []
        try:
            while not taken:
                for placed in islice(self.rows, count):
                    self.place = [self.place[0], self.place[1], placed.number + 1]
                    taken.append((placed, self.place))
                self.found_any = self.found_any or bool(taken)
                if len(taken) < count:
                    self._next_file()
        except DataError as error:
            raise DataError(f"{self.entry.path}: {error}.") from None
        except Exception as error:  # a connection, a parser
            raise DataError(unreadable(self.entry, error)) from error
        return taken

    def _next_file(self) -> None:
        passed, file, _ = self.place
        if file + 1 < len(self.files):
            self.place = [passed, file + 1, 0]
        elif not self.found_any:
            raise DataError("it has no rows: there is nothing to learn from")
        else:
            self.place, self.found_any = [passed + 1, 0, 0], False
        self.rows = self.files.from_row(self.place[1], self.place[2])


def _open(entry: DatasetEntry, fetched: Path) -> RowsFrom:
    if is_address(entry.path):
        kind = entry.ds_type or kind_of_name(entry, entry.path)
        return _Files(_remote_files(entry.path, rows_of(entry, kind))) if kind in ROW_KINDS else _Table(entry)
    splits = row_files(entry, fetched)
    if splits is None:
        return _Table(entry)
    name = split_name(entry)
    if name not in splits:
        raise DataError(f"it has no split '{name}'. Its splits are: {', '.join(splits)}")
    return _Files(splits[name])


def _remote_files(address: str, kind: Kind) -> tuple[RowFile, ...]:
    """Files at an address, read where they lie: nothing of them is kept on this disk."""
    if address.startswith(("http://", "https://")):
        return (RowFile(address, kind, lambda: _unpacked(urlopen(address, timeout=_SECONDS), urlsplit(address).path)),)
    fs, place = open_filesystem(address)
    names: list[str] = sorted(fs.glob(place)) if "*" in place else [place]
    if not names:
        raise DataError(f"there is no file '{address}'")

    def opener(name: str) -> IO[bytes]:
        return _unpacked(fs.open(name, "rb"), name)

    return tuple(RowFile(name, kind, partial(opener, name)) for name in names)


def _unpacked(raw: Any, name: str) -> IO[bytes]:
    buffered = io.BufferedReader(raw, CHUNK)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=buffered) if name.endswith(".gz") else buffered)
