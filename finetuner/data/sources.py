"""Dataset entries -> rows, through the `datasets` library."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.errors import DataError
from finetuner.recipe.rules import DATA_SUFFIXES, looks_local
from finetuner.recipe.sections import DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


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
        rows = _load(entry, path)
    except DataError:
        raise
    except Exception as error:  # the library raises anything, from its own errors to a parser's
        raise DataError(_unreadable(entry, error)) from error
    if len(rows) == 0:
        raise DataError(_no_rows(entry))
    if "__index_level_0__" in rows.column_names and _builder(entry, path.name) == "csv":  # pandas shifts them silently
        raise DataError(
            f"'{entry.path}' has rows with more fields than its first line has names. Quote the texts with commas."
        )
    _require_columns(entry, rows.column_names)
    if entry.shards is not None:
        rows = rows.shard(entry.shards, entry.shards_idx, contiguous=False)
    if entry.max_samples is not None:
        rows = rows.select(range(min(entry.max_samples, len(rows))))
    if len(rows) == 0:
        raise DataError(f"'{entry.path}' has no row in part {entry.shards_idx} of {entry.shards} shards.")
    return Source(entry, rows)


def _load(entry: DatasetEntry, path: Path) -> "datasets.Dataset":
    import datasets

    if path.is_file() or "://" in entry.path:
        builder = entry.ds_type or _builder(entry, entry.path)
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"'{entry.path}' is empty (0 bytes).")
        place = glob.escape(str(path)) if path.is_file() else entry.path
        return datasets.load_dataset(
            builder,
            # A part of the cache's key: a copy may keep the time of the last edit, but not that of the copying.
            name=f"changed-{path.stat().st_ctime_ns}" if path.is_file() else None,
            data_files={entry.split.partition("[")[0]: place},
            split=entry.split,
            **_options(builder),
        )
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _saved_to_disk(entry, path)
    files: Any = entry.data_files
    if isinstance(files, tuple):
        files = list(files)
    if entry.ds_type is not None:
        return datasets.load_dataset(
            entry.ds_type,
            name=entry.name,
            data_dir=str(path) if path.is_dir() else None,
            data_files=files if path.is_dir() or files is None else _at_hub(entry, files),
            split=entry.split,
            **_options(entry.ds_type),
        )
    place = str(path) if path.is_dir() else entry.path
    return datasets.load_dataset(place, entry.name, data_files=files, split=entry.split, revision=entry.revision)


def _at_hub(entry: DatasetEntry, files: list[str] | str) -> list[str]:
    revision = f"@{entry.revision}" if entry.revision else ""
    return [f"hf://datasets/{entry.path}{revision}/{file}" for file in ([files] if isinstance(files, str) else files)]


def _options(builder: str) -> dict[str, Any]:
    return {"keep_default_na": False} if builder == "csv" else {}  # "None" and "NA" are words like others


def _builder(entry: DatasetEntry, name: str) -> str:
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if suffix not in _BUILDERS and entry.ds_type is None and (looks_local(name) or Path(entry.path).is_file()):
        raise DataError(
            f"'{entry.path}' ends with '{suffix}'; a data file ends with {', '.join(DATA_SUFFIXES)}.\n"
            "Or say what is in it: `ds_type: json`."
        )
    return entry.ds_type or _BUILDERS.get(suffix, "json")


def _saved_to_disk(entry: DatasetEntry, path: Path) -> "datasets.Dataset":
    """A folder that `save_to_disk` wrote: one split without a name, or several."""
    import datasets

    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, datasets.DatasetDict) else {entry.split.partition("[")[0]: found}
    parts = datasets.ReadInstruction.from_spec(entry.split).to_absolute({n: len(rows) for n, rows in splits.items()})
    chosen = [splits[part.splitname].select(range(part.from_ or 0, part.to)) for part in parts]
    return datasets.concatenate_datasets(chosen)


def _wanted_columns(entry: DatasetEntry) -> tuple[tuple[str, ...], str]:
    """The columns that a row must have, and how other ones are named."""
    if isinstance(entry.type, InstructionFormat):
        return (entry.type.field_instruction, entry.type.field_output), "Name the columns in the `type` block (field_*)"
    if entry.type == "chat_template":
        return (entry.field_messages,), "Name the column with field_messages"
    if entry.type == "completion":
        return (entry.field,), "Name the column with `field`"
    rename = "Rename the columns"
    if entry.type is None:
        return ("input_ids", "labels"), "Say what the rows are (`type: alpaca`, `type: chat_template`, ...)"
    columns = {
        "alpaca": ("instruction", "output"),
        "input_output": ("segments",),
        "prompt_completion": ("prompt", "completion"),
    }
    return columns[entry.type], rename


def _require_columns(entry: DatasetEntry, columns: list[str]) -> None:
    wanted, advice = _wanted_columns(entry)
    missing = [name for name in wanted if name not in columns]
    if missing:
        kind = "the `type` block" if isinstance(entry.type, InstructionFormat) else f"`type: {entry.type}`"
        needs = "rows without a `type` need" if entry.type is None else f"{kind} needs"
        raise DataError(
            f"'{entry.path}' has no column '{missing[0]}', which {needs}.\n"
            f"Its columns are: {', '.join(columns)}.\n{advice}, or choose the `type` that fits."
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
