"""Load the rows of dataset entries.

JSON, CSV and text, local or at an address, are read by finetuner itself, row by row (row_files.py). Parquet, Arrow,
folders of `save_to_disk` and the hub go through the `datasets` library.
"""

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from finetuner.data.column_advice import column_advice
from finetuner.data.fetch import fetch, is_address
from finetuner.data.raw_records import RawRecord
from finetuner.data.row_files import Row, RowFile
from finetuner.data.row_layouts import layout_problem
from finetuner.data.source_files import (
    LocalFiles,
    builder_of_name,
    data_file_names,
    files_on_disk,
    find_row_files,
    first_split,
    hub_urls,
    is_saved_to_disk,
    require_split,
    require_tables,
    split_names,
)
from finetuner.data.table_rows import cell_cleaners, rows_of_columns
from finetuner.errors import DataError, RowFileError
from finetuner.recipe.rules import looks_local
from finetuner.recipe.sections import DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    import datasets

_ROWS_TO_CHECK = 100  # rows whose columns are checked before all are read


class SourceRow(NamedTuple):
    """A row, or the error that reading it gave, and its origin: a file or dataset, and its number from 0 there."""

    row: Row | DataError
    file: str
    number: int


class Source(Protocol):
    """The rows of one entry, in the order of its files."""

    @property
    def entry(self) -> DatasetEntry: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[list[SourceRow]]:
        """Yield all rows, `size` at a time."""


@dataclass(frozen=True)
class TableSource:
    """Rows of a table of the `datasets` library."""

    entry: DatasetEntry
    rows: "datasets.Dataset"

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[list[SourceRow]]:
        cleaners = cell_cleaners(self.rows.features) or {}
        for start in range(0, len(self.rows), size):
            rows = rows_of_columns(self.rows[start : start + size], cleaners)
            yield [SourceRow(row, self.entry.path, start + i) for i, row in enumerate(rows)]


class FileSlice(NamedTuple):
    """Rows [start, stop) of these files, counted through all of them."""

    files: tuple[RowFile, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class FileSource:
    """Rows that are read from files: `count` rows of the slices, every `step`-th from number `first` on."""

    entry: DatasetEntry
    slices: tuple[FileSlice, ...]
    count: int
    first: int = 0
    step: int = 1

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[list[SourceRow]]:
        rows = islice(self._rows(), self.count)
        while batch := list(islice(rows, size)):
            yield batch

    def _rows(self) -> Iterator[SourceRow]:
        number_in_slices = -1
        for part in self.slices:
            number_in_files = -1
            for file in part.files:
                for number, record in enumerate(file.records()):
                    number_in_files += 1
                    if not part.start <= number_in_files < part.stop:
                        continue
                    number_in_slices += 1
                    if number_in_slices % self.step == self.first:
                        yield SourceRow(parse_record(file, record), file.name, number)


def parse_record(file: RowFile, record: RawRecord) -> Row | DataError:
    """Return the row of a record, or the error that parsing it raised. Raises RowFileError if it holds several rows."""
    try:
        return file.parse(record)
    except RowFileError:
        raise
    except DataError as error:
        return error


def load_source(entry: DatasetEntry, fetched: Path) -> Source:
    """Return the rows of an entry; files at an address are downloaded into the folder `fetched`.

    Raises DataError if the dataset cannot be read, is empty, or lacks the columns of its type.
    """
    import datasets

    # `datasets` draws its own bars on every rank; ours say the same once.
    datasets.disable_progress_bars()
    try:
        splits = find_row_files(entry, fetched)
        if splits is not None:
            return _file_source(entry, splits)
        rows = _load(entry, fetched)
    except DataError:
        raise
    except Exception as error:  # the library raises anything, from its own errors to a parser's
        raise DataError(unreadable_message(entry, error)) from error
    if len(rows) == 0:
        raise DataError(_no_rows_message(entry))
    require_columns(entry, rows.column_names)
    if entry.shards is not None:
        rows = rows.shard(entry.shards, entry.shards_idx, contiguous=False)
    if entry.max_samples is not None:
        rows = rows.select(range(min(entry.max_samples, len(rows))))
    if len(rows) == 0:
        raise DataError(_no_row_in_shard_message(entry))
    return TableSource(entry, rows)


def _file_source(entry: DatasetEntry, splits: dict[str, tuple[RowFile, ...]]) -> FileSource:
    """Return the rows of these files that the entry's split, shards and max_samples choose."""
    import datasets

    counts = _count_rows(entry, splits)
    chosen = datasets.ReadInstruction.from_spec(entry.split).to_absolute(counts)
    slices = tuple(
        FileSlice(splits[one.splitname], one.from_ or 0, counts[one.splitname] if one.to is None else one.to)
        for one in chosen
    )
    num_rows = sum(part.stop - part.start for part in slices)
    if num_rows == 0:
        raise DataError(f"'{entry.path}' has no rows in the split '{entry.split}'; it has {sum(counts.values())}.")
    step = entry.shards or 1
    count = len(range(entry.shards_idx, num_rows, step))
    if count == 0:
        raise DataError(_no_row_in_shard_message(entry))
    source = FileSource(entry, slices, min(count, entry.max_samples or count), entry.shards_idx, step)
    require_usable(entry, next(source.batches(_ROWS_TO_CHECK), []))
    return source


def require_usable(entry: DatasetEntry, rows: list[SourceRow]) -> None:
    """Check the first rows of an entry's files, so that a file of another layout is not lost row by row.

    Raises DataError if every row is broken, or they lack a column that the entry's `type` needs.
    """
    parsed = [one.row for one in rows if not isinstance(one.row, DataError)]
    if rows and not parsed:
        first = rows[0]
        more = f"\nSo are all of the first {len(rows)} rows." if len(rows) > 1 else ""
        raise DataError(f"{first.file}: row {first.number}: {first.row}.{more}")
    require_columns(entry, list(dict.fromkeys(name for row in parsed for name in row)), layout_problem(entry, parsed))


def _count_rows(entry: DatasetEntry, splits: dict[str, tuple[RowFile, ...]]) -> dict[str, int]:
    """Return the number of rows of each split that the entry names. Raises DataError if there are none."""
    counts = {}
    for name in split_names(entry):
        try:
            counts[name] = sum(file.count() for file in require_split(entry, name, splits))
        except OSError as error:
            raise DataError(unreadable_message(entry, error)) from error
    if not any(counts.values()):
        raise DataError(_no_rows_message(entry))
    return counts


def _load(entry: DatasetEntry, fetched: Path) -> "datasets.Dataset":
    """Return the entry's split as `datasets` loads it."""
    import datasets

    path = Path(entry.path).expanduser()
    if is_saved_to_disk(path):
        return _load_saved(entry, path)
    found = files_on_disk(entry)
    if is_address(entry.path):
        files = {first_split(entry): fetch(entry.path, fetched)}
        found = LocalFiles(entry.ds_type or builder_of_name(entry, entry.path), files)
    if found is not None:
        return _load_tables(entry, found)
    names = data_file_names(entry)
    if entry.ds_type is not None:
        return datasets.load_dataset(
            entry.ds_type,
            name=entry.name,
            data_files=names if names is None else hub_urls(entry, names),
            split=entry.split,
            **({"keep_default_na": False} if entry.ds_type == "csv" else {}),  # "None" and "NA" are words like others
        )
    return datasets.load_dataset(entry.path, entry.name, data_files=names, split=entry.split, revision=entry.revision)


def _load_tables(entry: DatasetEntry, found: LocalFiles) -> "datasets.Dataset":
    """Return the entry's split of Parquet or Arrow files on this disk."""
    import datasets

    chosen = {name: require_split(entry, name, found.splits) for name in split_names(entry)}
    paths = [path for files in chosen.values() for path in files]
    require_tables(paths, found.kind)
    # Part of the library's cache key: a copied file may keep its time of change, but not its ctime.
    changed = hashlib.sha256(repr([(str(path), path.stat().st_ctime_ns) for path in paths]).encode()).hexdigest()[:16]
    return datasets.load_dataset(
        found.kind,
        name=f"changed-{changed}",
        data_files={name: [glob.escape(str(path.absolute())) for path in files] for name, files in chosen.items()},
        split=entry.split,
    )


def _load_saved(entry: DatasetEntry, folder: Path) -> "datasets.Dataset":
    """Return the entry's split of a folder that `save_to_disk` wrote, of one split without a name or of several."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {first_split(entry): saved}
    chosen = datasets.ReadInstruction.from_spec(entry.split).to_absolute({n: len(rows) for n, rows in splits.items()})
    return datasets.concatenate_datasets(
        [splits[one.splitname].select(range(one.from_ or 0, one.to)) for one in chosen]
    )


def require_columns(entry: DatasetEntry, columns: list[str], problem: str | None = None) -> None:
    """Raise DataError unless the columns that the entry's `type` needs are among these, and rows lie as rows do.

    `problem`: what is wrong with their layout, which says more than the names do.
    """
    missing = [name for name in entry.required_columns if name not in columns]
    if missing:
        kind = "the `type` block" if isinstance(entry.type, InstructionFormat) else f"`type: {entry.type}`"
        needs = "rows without a `type` need" if entry.type is None else f"{kind} needs"
        raise DataError(
            f"'{entry.path}' has no column '{missing[0]}', which {needs}.\n"
            f"Its columns are: {', '.join(columns)}.\n" + (f"{problem}." if problem else column_advice(entry, columns))
        )
    if problem:
        raise DataError(f"'{entry.path}': {problem}.")


def _no_row_in_shard_message(entry: DatasetEntry) -> str:
    return f"'{entry.path}' has no row in shard {entry.shards_idx} of {entry.shards}."


def _no_rows_message(entry: DatasetEntry) -> str:
    return f"'{entry.path}' has no rows: there is nothing to learn from."


def unreadable_message(entry: DatasetEntry, error: Exception) -> str:
    """Return the message for an entry that `datasets` or a parser failed to read."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # the innermost says what is wrong with the file
        cause = cause.__cause__
    reason = " ".join(str(cause).split())[:400] or type(cause).__name__
    if "corresponds to no data" in reason:  # how `datasets` says it of an empty list
        return _no_rows_message(entry)
    where = "Check the file." if looks_local(entry.path) else "Check the name, the split and the network."
    return f"cannot read the dataset '{entry.path}' (split '{entry.split}'): {reason}\n{where}"
