"""Read the rows of an entry without end: on demand, from any position on, and from the first file again after the last.

A position is [pass, file, row]. Rows before it are split off and not parsed, so resuming costs little; files before it
are not opened.
"""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from finetuner.data.fetch import data_files_in, is_address, open_filesystem
from finetuner.data.remote_files import (
    DEFAULT_RETRY,
    OpenedFile,
    ReconnectingFile,
    Retries,
    RetryPolicy,
    open_fsspec_at,
    open_http_at,
)
from finetuner.data.row_files import FileKind, Row, RowFile
from finetuner.data.source_files import (
    ROW_KINDS,
    builder_of_name,
    data_file_names,
    file_kind,
    files_on_disk,
    find_row_files,
    first_split,
    hub_urls,
    is_saved_to_disk,
    message_lists,
    require_split,
    require_tables,
)
from finetuner.data.sources import SourceRow, parse_record, require_usable, unreadable_message
from finetuner.data.table_rows import cell_cleaners, clean_row
from finetuner.data.unpacking import from_connection
from finetuner.errors import DataError, LostConnectionError, RowFileError
from finetuner.recipe.sections import DatasetEntry
from finetuner.redaction import hidden

if TYPE_CHECKING:
    import datasets

Position = list[int]  # [pass, file, row], each from 0
START: Position = [0, 0, 0]
_ROWS_TO_CHECK = 16
# [name, bytes or None, what else tells it from another version: a time in nanoseconds, an ETag, a commit]
FileVersion = list[Any]


class SeekableRows(Protocol):
    """The files of an entry, each readable from any row on."""

    versions: list[FileVersion]

    def __len__(self) -> int:
        """Number of files."""

    def from_row(self, file: int, row: int) -> Iterator[SourceRow]:
        """Yield the rows of a file from number `row` on."""


class _RowFiles:
    """Files of JSON, CSV or text, local or remote."""

    def __init__(self, files: tuple[RowFile, ...], versions: list[FileVersion]) -> None:
        self.files, self.versions = files, versions

    def __len__(self) -> int:
        return len(self.files)

    def from_row(self, file: int, row: int) -> Iterator[SourceRow]:
        opened = self.files[file]
        for number, record in enumerate(islice(opened.records(), row, None), row):
            yield SourceRow(parse_record(opened, record), opened.name, number)


class _IterableTable:
    """An IterableDataset of the `datasets` library, as one file: the hub, and what is not JSON, CSV or text."""

    def __init__(self, entry: DatasetEntry, policy: RetryPolicy) -> None:
        import datasets

        self.entry, self.policy = entry, policy
        path = Path(entry.path).expanduser()
        if is_saved_to_disk(path):
            saved = datasets.load_from_disk(str(path))
            table = saved[first_split(entry)] if isinstance(saved, datasets.DatasetDict) else saved
            self.rows, self.versions = table.to_iterable_dataset(), local_versions(sorted(path.rglob("*.arrow")))
            return
        builder = _streaming_builder(entry)
        self.versions = _builder_versions(builder, entry)
        self.rows = builder.as_streaming_dataset(split=entry.split)

    def __len__(self) -> int:
        return 1

    def from_row(self, file: int, row: int) -> Iterator[SourceRow]:
        retries, cleaners = Retries(self.entry.path, self.policy), cell_cleaners(self.rows.features)
        while True:
            try:
                for one in self.rows.skip(row) if row else self.rows:
                    yield SourceRow(clean_row(cast("Row", one), cleaners), self.entry.path, row)
                    row += 1
                    retries.succeeded()
                return
            except Exception as error:  # the library raises anything
                retries.failed(error)


def _streaming_builder(entry: DatasetEntry) -> "datasets.DatasetBuilder":
    """Return the builder of `datasets` for tables on this disk or at an address, or for a hub dataset."""
    import datasets

    found = files_on_disk(entry)
    if found is not None:
        split = first_split(entry)
        paths = require_split(entry, split, found.splits)
        require_tables(paths, found.kind)
        return datasets.load_dataset_builder(
            found.kind, data_files={split: [glob.escape(str(path.absolute())) for path in paths]}
        )
    names = data_file_names(entry)
    if is_address(entry.path):
        open_filesystem(entry.path)  # raises an error that names the missing package
        kind = entry.ds_type or builder_of_name(entry, entry.path)
        return datasets.load_dataset_builder(kind, data_files={entry.split: entry.path})
    if entry.ds_type is not None:
        files = None if names is None else {entry.split: hub_urls(entry, names)}
        return datasets.load_dataset_builder(entry.ds_type, entry.name, data_files=files)
    return datasets.load_dataset_builder(entry.path, entry.name, data_files=names, revision=entry.revision)


def local_versions(paths: list[Path]) -> list[FileVersion]:
    """Return the versions of local files by size and time: hashing a corpus that is worth streaming takes hours."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _builder_versions(builder: Any, entry: DatasetEntry) -> list[FileVersion]:
    """Return the versions of the files of the entry's split; of a dataset in the hub's cache, its hash."""
    files = (builder.config.data_files or {}).get(entry.split)
    if files is None:
        return [[entry.path, None, str(builder.hash)]]
    if all(Path(file).is_file() for file in files):
        return local_versions([Path(file) for file in files])
    return [
        [str(file), None, "@".join(map(str, facts))] for file, facts in zip(files, files.origin_metadata, strict=True)
    ]


class StreamingSource:
    """The rows of one entry from a position on, without end; `position` is that of the next row."""

    def __init__(self, entry: DatasetEntry, position: Position, fetched: Path, policy: RetryPolicy) -> None:
        """Raises DataError if the rows cannot be reached."""
        self.entry, self.position = entry, list(position)
        try:
            self.files = _open(entry, fetched, policy)
        except DataError:
            raise
        except Exception as error:  # the library raises anything
            raise DataError(unreadable_message(entry, error)) from error
        self.rows = self.files.from_row(self.position[1], self.position[2])
        self.found_rows = True  # in this pass; a first pass that starts at the end of the files need not find any
        self.checked = self.position != START  # a resumed run's rows were checked when it began

    def take(self, count: int) -> list[tuple[SourceRow, Position]]:
        """Return up to `count` rows, each with the position after it; at least one.

        Fewer than `count` at the end of a file. After the last file the first one is read again, in the next pass.
        """
        taken: list[tuple[SourceRow, Position]] = []
        try:
            while not taken:
                for row in islice(self.rows, count):
                    self.position = [self.position[0], self.position[1], row.number + 1]
                    taken.append((row, self.position))
                self.found_rows = self.found_rows or bool(taken)
                if len(taken) < count:
                    self._next_file()
        except (LostConnectionError, RowFileError):
            raise
        except DataError as error:
            raise DataError(f"{self.entry.path}: {error}.") from None
        except Exception as error:  # a connection, a parser
            raise DataError(unreadable_message(self.entry, error)) from error
        if not self.checked and (len(taken) >= _ROWS_TO_CHECK or len(taken) < count):
            require_usable(self.entry, [row for row, _ in taken])
        self.checked = True
        return taken

    def _next_file(self) -> None:
        num_passes, file, _ = self.position
        if file + 1 < len(self.files):
            self.position = [num_passes, file + 1, 0]
        elif not self.found_rows:
            raise DataError("it has no rows: there is nothing to learn from")
        else:
            self.position, self.found_rows = [num_passes + 1, 0, 0], False
        self.rows = self.files.from_row(self.position[1], self.position[2])


@dataclass(frozen=True)
class SourceHead:
    """The first rows of an entry as a Source; the rows after them are not read."""

    entry: DatasetEntry
    rows: list[SourceRow]

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[list[SourceRow]]:
        for start in range(0, len(self.rows), size):
            yield self.rows[start : start + size]


def read_head(entry: DatasetEntry, fetched: Path) -> SourceHead:
    """Read the first `max_samples` rows of an entry, or all if it has fewer."""
    count, stream = entry.max_samples or 1, StreamingSource(entry, START, fetched, DEFAULT_RETRY)
    rows: list[SourceRow] = []
    while len(rows) < count and stream.position[0] == 0:
        rows += [row for row, _ in stream.take(count - len(rows))]
    return SourceHead(entry, rows)


def _open(entry: DatasetEntry, fetched: Path, policy: RetryPolicy) -> SeekableRows:
    if is_address(entry.path):
        kind = entry.ds_type or builder_of_name(entry, entry.path)
        if kind not in ROW_KINDS:
            return _IterableTable(entry, policy)
        return _open_remote(entry, file_kind(entry, kind), policy)
    splits = find_row_files(entry, fetched)
    if splits is None:
        return _IterableTable(entry, policy)
    files = require_split(entry, first_split(entry), splits)
    found = files_on_disk(entry)
    assert found is not None, "files of rows on this disk"
    return _RowFiles(files, local_versions(found.splits[first_split(entry)]))


def _open_remote(entry: DatasetEntry, kind: FileKind, policy: RetryPolicy) -> _RowFiles:
    """Return the files at an address, which are read over the network and not stored on this disk."""
    openers = _openers(entry.path)
    versions = []
    for name, open_at in openers.items():
        with ReconnectingFile(name, open_at, policy) as file:
            versions.append([name, file.opened.size, file.opened.version])

    def opener(name: str) -> Callable[[], IO[bytes]]:
        return lambda: from_connection(ReconnectingFile(name, openers[name], policy))

    files = [RowFile(name, kind, opener(name), message_lists(entry)) for name in openers]
    return _RowFiles(tuple(files), versions)


def _openers(address: str) -> dict[str, Callable[[int], OpenedFile]]:
    """Return file name -> a function that opens it from a byte on, for each file at an address."""
    if address.startswith(("http://", "https://")):
        return {hidden(address.partition("?")[0]): partial(open_http_at, address)}  # the query may hold a key
    fs, place = open_filesystem(address)
    names: list[str] = sorted(fs.glob(place)) if "*" in place else [place]
    if "*" not in place and fs.isdir(place):
        names = data_files_in(fs, place)
    if not names:
        raise DataError(f"there is no file '{address}'.")
    return {name: partial(open_fsspec_at, fs, name) for name in names}
