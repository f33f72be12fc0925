"""Dataset entries -> rows.

JSON, CSV and text on this disk or at an address are read by finetuner itself, row by row (`files`). Parquet, Arrow,
folders of `save_to_disk` and the hub go through the `datasets` library.
"""

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from finetuner.data.fetch import fetch, is_address
from finetuner.data.row_files import Kind, Row, RowFile, local_file
from finetuner.errors import DataError
from finetuner.recipe.rules import DATA_SUFFIXES, looks_local
from finetuner.recipe.sections import DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
ROW_KINDS = ("json", "csv", "text")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")  # of rows, which they do not hold
_SAMPLE = 100  # rows that are asked for their columns


class Placed(NamedTuple):
    """A row, or what is wrong with it; and where it stands: a file or dataset, and the number from 0 in it."""

    row: Row | DataError
    file: str
    number: int


class Source(Protocol):
    """The rows of one entry, in the files' order."""

    @property
    def entry(self) -> DatasetEntry: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[list[Placed]]:
        """`size` rows at a time."""


@dataclass(frozen=True)
class TableSource:
    """Rows that the `datasets` library holds."""

    entry: DatasetEntry
    rows: "datasets.Dataset"

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[list[Placed]]:
        for start in range(0, len(self.rows), size):
            chunk = self.rows[start : start + size]
            names = list(chunk)
            cells = zip(*chunk.values(), strict=True)
            yield [
                Placed(dict(zip(names, row, strict=True)), self.entry.path, start + i) for i, row in enumerate(cells)
            ]


class Part(NamedTuple):
    """Rows [start, stop) of these files, end to end."""

    files: tuple[RowFile, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class FileSource:
    """Rows that are read from files: every `step`-th row of the parts, from the `first`, and `count` of them."""

    entry: DatasetEntry
    parts: tuple[Part, ...]
    count: int
    first: int = 0
    step: int = 1

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[list[Placed]]:
        rows = islice(self._placed(), self.count)
        while batch := list(islice(rows, size)):
            yield batch

    def _placed(self) -> Iterator[Placed]:
        nth = -1
        for part in self.parts:
            at = -1
            for file in part.files:
                for number, record in enumerate(file.records()):
                    at += 1
                    if not part.start <= at < part.stop:
                        continue
                    nth += 1
                    if nth % self.step == self.first:
                        yield Placed(parsed(file, record), file.name, number)


def parsed(file: RowFile, record: Any) -> Row | DataError:
    try:
        return file.parse(record)
    except DataError as error:
        return error


def load_source(entry: DatasetEntry, fetched: Path) -> Source:
    """`fetched` is the folder for files that lie at an address.

    Raises DataError if the dataset cannot be read, is empty, or lacks the columns of its type.
    """
    import datasets

    # `datasets` draws its own bars on every rank; ours say the same once.
    datasets.disable_progress_bars()
    try:
        splits = row_files(entry, fetched)
        if splits is not None:
            return _file_source(entry, splits)
        rows = _load(entry, fetched)
    except DataError:
        raise
    except Exception as error:  # the library raises anything, from its own errors to a parser's
        raise DataError(unreadable(entry, error)) from error
    if len(rows) == 0:
        raise DataError(_no_rows(entry))
    require_columns(entry, rows.column_names)
    if entry.shards is not None:
        rows = rows.shard(entry.shards, entry.shards_idx, contiguous=False)
    if entry.max_samples is not None:
        rows = rows.select(range(min(entry.max_samples, len(rows))))
    if len(rows) == 0:
        raise DataError(_no_row_in_shard(entry))
    return TableSource(entry, rows)


def row_files(entry: DatasetEntry, fetched: Path) -> dict[str, tuple[RowFile, ...]] | None:
    """Split -> its files of JSON, CSV or text on this disk or at an address; None for what only `datasets` can read.

    A file by itself is the split that the entry asks for.
    """
    import datasets

    path = Path(entry.path).expanduser()
    if path.is_file() or is_address(entry.path):
        kind = entry.ds_type or kind_of_name(entry, entry.path)
        if kind not in ROW_KINDS:
            return None
        files = [path] if path.is_file() else fetch(entry.path, fetched)
        return {split_name(entry): tuple(_checked_file(entry, file, kind) for file in files)}
    if not path.is_dir() or is_saved_to_disk(path):
        return None
    if entry.ds_type is None and entry.data_files is None:
        _require_one_kind(entry, path)
    names: Any = list(entry.data_files) if isinstance(entry.data_files, tuple) else entry.data_files
    if entry.ds_type is not None:
        builder = datasets.load_dataset_builder(entry.ds_type, data_dir=str(path), data_files=names)
    else:
        builder = datasets.load_dataset_builder(str(path), entry.name, data_files=names)
    kind = type(builder).__module__.rpartition(".")[2]
    found = builder.config.data_files or {}
    if kind not in ROW_KINDS or not all(Path(file).is_file() for files in found.values() for file in files):
        return None
    return {str(name): tuple(_checked_file(entry, Path(file), kind) for file in files) for name, files in found.items()}


def _require_one_kind(entry: DatasetEntry, folder: Path) -> None:
    """`datasets` reads the most frequent kind and leaves out the others without a word."""
    kinds: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        kind = _BUILDERS.get(Path(name.lower().removesuffix(".gz")).suffix)
        hidden = any(part.startswith((".", "_")) for part in Path(name).parts)
        if kind is not None and file.is_file() and not hidden and file.name not in _DESCRIPTIONS:
            kinds.setdefault(kind, []).append(name)
    if len(kinds) > 1:
        some = {kind: ", ".join(names[:3]) + ", ..." * (len(names) > 3) for kind, names in kinds.items()}
        listed = "\n".join(f"  {kind}: {names}" for kind, names in some.items())
        raise DataError(
            f"'{entry.path}' holds files of several kinds, of which one would be read:\n{listed}\n"
            f"Name those to read (`data_files: ['{next(iter(kinds.values()))[0]}']`), each kind in an entry of its own."
        )


def _checked_file(entry: DatasetEntry, path: Path, kind: str) -> RowFile:
    if path.stat().st_size == 0:
        raise DataError(f"'{entry.path if path.name in entry.path else path}' is empty (0 bytes).")
    return local_file(path, rows_of(entry, kind))


def rows_of(entry: DatasetEntry, kind: str) -> Kind:
    """How the files of an entry are cut into rows."""
    return "document" if kind == "text" and entry.sample_by == "document" else cast("Kind", kind)


def _file_source(entry: DatasetEntry, splits: dict[str, tuple[RowFile, ...]]) -> FileSource:
    import datasets

    counts = {}
    for name in _split_names(entry):
        if name not in splits:
            raise DataError(f"'{entry.path}' has no split '{name}'. Its splits are: {', '.join(splits)}.")
        try:
            counts[name] = sum(file.count() for file in splits[name])
        except DataError as error:
            raise DataError(f"{entry.path}: {error}.") from None
        except (OSError, EOFError) as error:  # a .gz that is none, or is cut off
            raise DataError(unreadable(entry, error)) from error
    if not any(counts.values()):
        raise DataError(_no_rows(entry))
    chosen = datasets.ReadInstruction.from_spec(entry.split).to_absolute(counts)
    parts = tuple(
        Part(splits[one.splitname], one.from_ or 0, counts[one.splitname] if one.to is None else one.to)
        for one in chosen
    )
    num_rows = sum(part.stop - part.start for part in parts)
    if num_rows == 0:
        raise DataError(f"'{entry.path}' has no rows in the split '{entry.split}'; it has {sum(counts.values())}.")
    step = entry.shards or 1
    count = len(range(entry.shards_idx, num_rows, step))
    if count == 0:
        raise DataError(_no_row_in_shard(entry))
    source = FileSource(entry, parts, min(count, entry.max_samples or count), entry.shards_idx, step)
    for head in source.batches(_SAMPLE):
        rows = [placed.row for placed in head if not isinstance(placed.row, DataError)]
        if rows:
            require_columns(entry, list(dict.fromkeys(name for row in rows for name in row)))
        break
    return source


def _split_names(entry: DatasetEntry) -> list[str]:
    return [re.split(r"[\[(]", part.strip())[0] for part in entry.split.split("+")]


def split_name(entry: DatasetEntry) -> str:
    return _split_names(entry)[0]


def _load(entry: DatasetEntry, fetched: Path) -> "datasets.Dataset":
    import datasets

    path = Path(entry.path).expanduser()
    if path.is_file() or is_address(entry.path):
        files = [path] if path.is_file() else fetch(entry.path, fetched)
        return datasets.load_dataset(
            entry.ds_type or kind_of_name(entry, entry.path),
            # A part of the cache's key: a copy may keep the time of the last edit, but not that of the copying.
            name=f"changed-{files[0].stat().st_ctime_ns}",
            data_files={split_name(entry): [glob.escape(str(file)) for file in files]},
            split=entry.split,
        )
    if is_saved_to_disk(path):
        return _saved_to_disk(entry, path)
    names: Any = list(entry.data_files) if isinstance(entry.data_files, tuple) else entry.data_files
    if entry.ds_type is not None:
        return datasets.load_dataset(
            entry.ds_type,
            name=entry.name,
            data_dir=str(path) if path.is_dir() else None,
            data_files=names if path.is_dir() or names is None else at_hub(entry, names),
            split=entry.split,
            **({"keep_default_na": False} if entry.ds_type == "csv" else {}),  # "None" and "NA" are words like others
        )
    place = str(path) if path.is_dir() else entry.path
    return datasets.load_dataset(place, entry.name, data_files=names, split=entry.split, revision=entry.revision)


def at_hub(entry: DatasetEntry, files: list[str] | str) -> list[str]:
    revision = f"@{entry.revision}" if entry.revision else ""
    return [f"hf://datasets/{entry.path}{revision}/{file}" for file in ([files] if isinstance(files, str) else files)]


def kind_of_name(entry: DatasetEntry, name: str) -> str:
    plain = name.partition("?")[0] if is_address(name) else name
    suffix = Path(plain.lower().removesuffix(".gz")).suffix
    if suffix not in _BUILDERS and (looks_local(name) or Path(entry.path).expanduser().is_file()):
        raise DataError(
            f"'{entry.path}' ends with '{suffix}'; a data file ends with {', '.join(DATA_SUFFIXES)}.\n"
            "Or say what is in it: `ds_type: json`."
        )
    return _BUILDERS.get(suffix, "json")


def is_saved_to_disk(path: Path) -> bool:
    return path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())


def _saved_to_disk(entry: DatasetEntry, path: Path) -> "datasets.Dataset":
    """A folder that `save_to_disk` wrote: one split without a name, or several."""
    import datasets

    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, datasets.DatasetDict) else {split_name(entry): found}
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


def require_columns(entry: DatasetEntry, columns: list[str]) -> None:
    wanted, advice = _wanted_columns(entry)
    missing = [name for name in wanted if name not in columns]
    if missing:
        kind = "the `type` block" if isinstance(entry.type, InstructionFormat) else f"`type: {entry.type}`"
        needs = "rows without a `type` need" if entry.type is None else f"{kind} needs"
        raise DataError(
            f"'{entry.path}' has no column '{missing[0]}', which {needs}.\n"
            f"Its columns are: {', '.join(columns)}.\n{advice}, or choose the `type` that fits."
        )


def _no_row_in_shard(entry: DatasetEntry) -> str:
    return f"'{entry.path}' has no row in part {entry.shards_idx} of {entry.shards} shards."


def _no_rows(entry: DatasetEntry) -> str:
    return f"'{entry.path}' has no rows: there is nothing to learn from."


def unreadable(entry: DatasetEntry, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # the innermost says what is wrong with the file
        cause = cause.__cause__
    reason = " ".join(str(cause).split())[:400] or type(cause).__name__
    if "corresponds to no data" in reason:  # how `datasets` says it of an empty list
        return _no_rows(entry)
    where = "Check the file." if looks_local(entry.path) else "Check the name, the split and the network."
    return f"cannot read the dataset '{entry.path}' (split '{entry.split}'): {reason}\n{where}"
