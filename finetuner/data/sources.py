"""Dataset entries -> rows, through the `datasets` library."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.errors import DataError
from finetuner.recipe.rules import DATA_SUFFIXES, looks_local
from finetuner.recipe.sections import DatasetEntry

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]

_COLUMNS: dict[str, tuple[str, ...]] = {"alpaca": ("instruction", "output")}


@dataclass(frozen=True)
class Source:
    """The rows of one entry, in the file's order."""

    entry: DatasetEntry
    rows: "datasets.Dataset"

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[tuple[int, list[Row]]]:
        """(number of the first row, rows), `size` rows at a time."""
        for start in range(0, len(self.rows), size):
            chunk = self.rows[start : start + size]
            names = list(chunk)
            yield start, [dict(zip(names, cells, strict=True)) for cells in zip(*chunk.values(), strict=True)]


def load_source(entry: DatasetEntry) -> Source:
    """Raises DataError if the dataset cannot be read, is empty, or lacks the columns of its type."""
    import datasets

    # `datasets` draws its own bars on every rank; ours say the same once.
    datasets.disable_progress_bars()
    path = Path(entry.path).expanduser()
    try:
        if path.is_file():
            suffix = path.suffix.lower()
            if suffix not in DATA_SUFFIXES:
                raise DataError(
                    f"'{entry.path}' ends with '{suffix}'; a data file ends with {', '.join(DATA_SUFFIXES)}."
                )
            if path.stat().st_size == 0:
                raise DataError(f"'{entry.path}' is empty (0 bytes).")
            builder = {".csv": "csv", ".parquet": "parquet"}.get(suffix, "json")
            rows = datasets.load_dataset(
                builder,
                # A part of the cache's key: a copy may keep the time of the last edit, but not that of the copying.
                name=f"changed-{path.stat().st_ctime_ns}",
                data_files={entry.split.partition("[")[0]: glob.escape(str(path))},
                split=entry.split,
                **({"keep_default_na": False} if builder == "csv" else {}),  # "None" and "NA" are words like others
            )
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else entry.path, entry.name, split=entry.split)
    except DataError:
        raise
    except Exception as error:  # the library raises anything, from its own errors to a parser's
        raise DataError(_unreadable(entry, error)) from error
    if len(rows) == 0:
        raise DataError(_no_rows(entry))
    if path.suffix.lower() == ".csv" and "__index_level_0__" in rows.column_names:  # pandas shifts them, and is silent
        raise DataError(
            f"'{entry.path}' has rows with more fields than its first line has names. Quote the texts with commas."
        )
    _require_columns(entry, rows.column_names)
    return Source(entry, rows)


def _require_columns(entry: DatasetEntry, columns: list[str]) -> None:
    wanted = (entry.field_messages,) if entry.type == "chat_template" else _COLUMNS[entry.type]
    missing = [name for name in wanted if name not in columns]
    if missing:
        advice = "Name the column with field_messages" if entry.type == "chat_template" else "Rename the columns"
        raise DataError(
            f"'{entry.path}' has no column '{missing[0]}', which `type: {entry.type}` needs.\n"
            f"Its columns are: {', '.join(columns)}.\n{advice}, or choose the `type` that fits."
        )

    if entry.type == "chat_template" and "tools" in columns:
        raise DataError(
            f"'{entry.path}' has a column 'tools': training on tool calls is not supported yet, and the tools would be "
            "left out of the prompts.\nRemove or rename the column to train without them."
        )


def _no_rows(entry: DatasetEntry) -> str:
    return f"'{entry.path}' has no rows: there is nothing to learn from."


def _unreadable(entry: DatasetEntry, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # the innermost says what is wrong with the file
        cause = cause.__cause__
    reason = " ".join(str(cause).split())[:400] or type(cause).__name__
    if "corresponds to no data" in reason:  # how `datasets` says it of an empty list
        return _no_rows(entry)
    where = "Check the file." if looks_local(entry.path) else "Check the name, the split and the network."
    return f"cannot read the dataset '{entry.path}' (split '{entry.split}'): {reason}\n{where}"
