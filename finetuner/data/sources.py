"""Load the rows of dataset entries.

JSON, CSV and text, local or at an address, are read by finetuner itself, row by row (row_files.py). Parquet, Arrow,
folders of `save_to_disk` and the hub go through the `datasets` library.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from finetuner.data.column_advice import column_advice
from finetuner.data.fetch import fetch, is_address
from finetuner.data.row_files import RawRecord, Row, RowFile
from finetuner.data.source_files import (
    builder_of_name,
    data_file_names,
    find_row_files,
    first_split,
    hub_urls,
    is_saved_to_disk,
    require_split,
    split_names,
)
from finetuner.errors import DataError
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
        for start in range(0, len(self.rows), size):
            chunk = self.rows[start : start + size]
            names = list(chunk)
            cells = zip(*chunk.values(), strict=True)
            yield [
                SourceRow(dict(zip(names, row, strict=True)), self.entry.path, start + i) for i, row in enumerate(cells)
            ]


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
    """Return the row of a record, or the error that parsing it raised."""
    try:
        return file.parse(record)
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
    names = _column_names(next(source.batches(_ROWS_TO_CHECK), []))
    if names is not None:
        require_columns(entry, names)
    return source


def _column_names(rows: list[SourceRow]) -> list[str] | None:
    """Return the names of all columns that some row has; None if every row is broken."""
    parsed = [one.row for one in rows if not isinstance(one.row, DataError)]
    return list(dict.fromkeys(name for row in parsed for name in row)) if parsed else None


def _count_rows(entry: DatasetEntry, splits: dict[str, tuple[RowFile, ...]]) -> dict[str, int]:
    """Return the number of rows of each split that the entry names. Raises DataError if there are none."""
    counts = {}
    for name in split_names(entry):
        require_split(entry, name, splits)
        try:
            counts[name] = sum(file.count() for file in splits[name])
        except DataError as error:
            raise DataError(f"{entry.path}: {error}.") from None
        except (OSError, EOFError) as error:  # a .gz that is none, or is cut off
            raise DataError(unreadable_message(entry, error)) from error
    if not any(counts.values()):
        raise DataError(_no_rows_message(entry))
    return counts


def _load(entry: DatasetEntry, fetched: Path) -> "datasets.Dataset":
    """Return the entry's split as `datasets` loads it."""
    import datasets

    path = Path(entry.path).expanduser()
    if path.is_file() or is_address(entry.path):
        files = [path] if path.is_file() else fetch(entry.path, fetched)
        return datasets.load_dataset(
            entry.ds_type or builder_of_name(entry, entry.path),
            # Part of the library's cache key: a copied file may keep its time of change, but not its ctime.
            name=f"changed-{files[0].stat().st_ctime_ns}",
            data_files={first_split(entry): [glob.escape(str(file)) for file in files]},
            split=entry.split,
        )
    if is_saved_to_disk(path):
        return _load_saved(entry, path)
    names = data_file_names(entry)
    if entry.ds_type is not None:
        return datasets.load_dataset(
            entry.ds_type,
            name=entry.name,
            data_dir=str(path) if path.is_dir() else None,
            data_files=names if path.is_dir() or names is None else hub_urls(entry, names),
            split=entry.split,
            **({"keep_default_na": False} if entry.ds_type == "csv" else {}),  # "None" and "NA" are words like others
        )
    place = str(path) if path.is_dir() else entry.path
    return datasets.load_dataset(place, entry.name, data_files=names, split=entry.split, revision=entry.revision)


def _load_saved(entry: DatasetEntry, folder: Path) -> "datasets.Dataset":
    """Return the entry's split of a folder that `save_to_disk` wrote, of one split without a name or of several."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {first_split(entry): saved}
    chosen = datasets.ReadInstruction.from_spec(entry.split).to_absolute({n: len(rows) for n, rows in splits.items()})
    return datasets.concatenate_datasets(
        [splits[one.splitname].select(range(one.from_ or 0, one.to)) for one in chosen]
    )


def require_columns(entry: DatasetEntry, columns: list[str]) -> None:
    """Raise DataError unless the columns that the entry's `type` needs are among these."""
    missing = [name for name in entry.required_columns if name not in columns]
    if missing:
        kind = "the `type` block" if isinstance(entry.type, InstructionFormat) else f"`type: {entry.type}`"
        needs = "rows without a `type` need" if entry.type is None else f"{kind} needs"
        raise DataError(
            f"'{entry.path}' has no column '{missing[0]}', which {needs}.\n"
            f"Its columns are: {', '.join(columns)}.\n{column_advice(entry, columns)}"
        )


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
