"""The rows of an entry without an end: read as they are needed, from any place on, and from the start again.

A place is [pass, file, row]. Rows before it are cut and not read, so that going on costs little; files before it are
not opened.
"""

import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, cast

from finetuner.data.fetch import data_files_in, is_address, open_filesystem
from finetuner.data.remote_files import (
    PATIENT,
    Opened,
    Patience,
    SteadyFile,
    Tries,
    open_http,
    open_in,
)
from finetuner.data.row_files import CHUNK, Kind, Row, RowFile
from finetuner.data.sources import (
    ROW_KINDS,
    Placed,
    at_hub,
    is_saved_to_disk,
    kind_of_name,
    parsed,
    row_files,
    rows_of,
    split_name,
    unreadable,
)
from finetuner.errors import DataError, LostConnectionError
from finetuner.recipe.sections import DatasetEntry
from finetuner.redaction import hidden

Place = list[int]  # [pass, file, row], each from 0
START: Place = [0, 0, 0]
# [name, bytes or None, what else tells it from another version: a time in nanoseconds, an ETag, a commit]
FileFacts = list[Any]


class RowsFrom(Protocol):
    """Files of rows, or what `datasets` reads as one."""

    facts: list[FileFacts]

    def __len__(self) -> int: ...

    def from_row(self, file: int, row: int) -> Iterator[Placed]:
        """The rows of a file, from that one on."""


class _Files:
    def __init__(self, files: tuple[RowFile, ...], facts: list[FileFacts]) -> None:
        self.files, self.facts = files, facts

    def __len__(self) -> int:
        return len(self.files)

    def from_row(self, file: int, row: int) -> Iterator[Placed]:
        one = self.files[file]
        for number, record in enumerate(islice(one.records(), row, None), row):
            yield Placed(parsed(one, record), one.name, number)


class _Table:
    """An IterableDataset of the `datasets` library: what is not JSON, CSV or text, and the hub."""

    def __init__(self, entry: DatasetEntry, patience: Patience) -> None:
        import datasets

        self.entry, self.patience = entry, patience
        path = Path(entry.path).expanduser()
        if is_saved_to_disk(path):
            found = datasets.load_from_disk(str(path))
            whole = found[split_name(entry)] if isinstance(found, datasets.DatasetDict) else found
            self.rows, self.facts = whole.to_iterable_dataset(), local_facts(sorted(path.rglob("*.arrow")))
            return
        names: Any = list(entry.data_files) if isinstance(entry.data_files, tuple) else entry.data_files
        folder = None
        if path.is_file() or is_address(entry.path):
            if is_address(entry.path):
                open_filesystem(entry.path)  # says which package is missing
            place, names = entry.ds_type or kind_of_name(entry, entry.path), {entry.split: entry.path}
        elif entry.ds_type is not None:
            place, folder = entry.ds_type, str(path) if path.is_dir() else None
            names = names if path.is_dir() or names is None else {entry.split: at_hub(entry, names)}
        else:
            place = str(path) if path.is_dir() else entry.path
        builder = datasets.load_dataset_builder(
            place, entry.name, data_dir=folder, data_files=names, revision=entry.revision
        )
        self.facts = _builder_facts(builder, entry)
        self.rows = builder.as_streaming_dataset(split=entry.split)

    def __len__(self) -> int:
        return 1

    def from_row(self, file: int, row: int) -> Iterator[Placed]:
        tries = Tries(self.entry.path, self.patience)
        while True:
            try:
                for one in self.rows.skip(row) if row else self.rows:
                    yield Placed(cast("Row", one), self.entry.path, row)
                    row += 1
                    tries.went_well()
                return
            except Exception as error:  # the library raises anything
                tries.failed(error)


def local_facts(paths: list[Path]) -> list[FileFacts]:
    """Not the bytes: reading them all would take hours where streaming is worth its while."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _builder_facts(builder: Any, entry: DatasetEntry) -> list[FileFacts]:
    """Of the files of the split, or of what lies prepared in the hub's cache, which is named by its content."""
    files = (builder.config.data_files or {}).get(entry.split)
    if files is None:
        return [[entry.path, None, str(builder.hash)]]
    if all(Path(file).is_file() for file in files):
        return local_facts([Path(file) for file in files])
    return [
        [str(file), None, "@".join(map(str, facts))] for file, facts in zip(files, files.origin_metadata, strict=True)
    ]


class EndlessRows:
    """Rows of one entry, from a place on; `place` is that of the next row."""

    def __init__(self, entry: DatasetEntry, place: Place, fetched: Path, patience: Patience) -> None:
        """Raises DataError if the rows cannot be reached."""
        self.entry, self.place = entry, list(place)
        try:
            self.files = _open(entry, fetched, patience)
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
        except LostConnectionError:
            raise
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


@dataclass(frozen=True)
class Head:
    """The first rows of an entry as a source: what lies behind them is not read."""

    entry: DatasetEntry
    rows: list[Placed]

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[list[Placed]]:
        for start in range(0, len(self.rows), size):
            yield self.rows[start : start + size]


def head_of(entry: DatasetEntry, fetched: Path) -> Head:
    """As many as max_samples says."""
    count, stream = entry.max_samples or 1, EndlessRows(entry, START, fetched, PATIENT)
    rows: list[Placed] = []
    while len(rows) < count and stream.place[0] == 0:
        rows += [placed for placed, _ in stream.take(count - len(rows))]
    return Head(entry, rows)


def _open(entry: DatasetEntry, fetched: Path, patience: Patience) -> RowsFrom:
    if is_address(entry.path):
        kind = entry.ds_type or kind_of_name(entry, entry.path)
        if kind not in ROW_KINDS:
            return _Table(entry, patience)
        return _remote_files(entry.path, rows_of(entry, kind), patience)
    splits = row_files(entry, fetched)
    if splits is None:
        return _Table(entry, patience)
    name = split_name(entry)
    if name not in splits:
        raise DataError(f"'{entry.path}' has no split '{name}'. Its splits are: {', '.join(splits)}.")
    return _Files(splits[name], local_facts([Path(file.name) for file in splits[name]]))


def _remote_files(address: str, kind: Kind, patience: Patience) -> _Files:
    """Files at an address, read where they lie: nothing of them is kept on this disk."""
    if address.startswith(("http://", "https://")):
        openers = {hidden(address.partition("?")[0]): partial(open_http, address)}  # behind it may stand a key
    else:
        fs, place = open_filesystem(address)
        names: list[str] = sorted(fs.glob(place)) if "*" in place else [place]
        if "*" not in place and fs.isdir(place):
            names = data_files_in(fs, place)
        if not names:
            raise DataError(f"there is no file '{address}'.")
        openers = {name: partial(open_in, fs, name) for name in names}
    facts = []
    for name, open_at in openers.items():
        with SteadyFile(name, open_at, patience) as file:
            facts.append([name, file.opened.size, file.opened.version])
    files = [RowFile(name, kind, partial(_unpacked, name, open_at, patience)) for name, open_at in openers.items()]
    return _Files(tuple(files), facts)


def _unpacked(name: str, open_at: Callable[[int], Opened], patience: Patience) -> IO[bytes]:
    buffered = io.BufferedReader(SteadyFile(name, open_at, patience), CHUNK)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=buffered) if name.endswith(".gz") else buffered)
