"""Find the files of a dataset entry, and their kind: which finetuner reads itself, and which `datasets` reads."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetuner.data.fetch import fetch, is_address
from finetuner.data.row_files import FileKind, RowFile, local_file
from finetuner.errors import DataError
from finetuner.recipe.rules import DATA_SUFFIXES, looks_local
from finetuner.recipe.sections import DatasetEntry

if TYPE_CHECKING:
    import datasets

ROW_KINDS = ("json", "csv", "text")  # what finetuner reads itself, by the names of the builders of `datasets`
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")  # they hold no rows


def find_row_files(entry: DatasetEntry, fetched: Path) -> dict[str, tuple[RowFile, ...]] | None:
    """Return split -> its files of JSON, CSV or text; None for an entry that only `datasets` can read.

    A file or address is the split that the entry asks for, and files at an address are downloaded into `fetched`.
    Raises DataError if a file is empty, or a folder holds files of several kinds.
    """
    path = Path(entry.path).expanduser()
    if path.is_file() or is_address(entry.path):
        kind = entry.ds_type or builder_of_name(entry, entry.path)
        if kind not in ROW_KINDS:
            return None
        files = [path] if path.is_file() else fetch(entry.path, fetched)
        return {first_split(entry): tuple(_open_row_file(entry, file, kind) for file in files)}
    if not path.is_dir() or is_saved_to_disk(path):
        return None
    return _files_of_folder(entry, path)


def _files_of_folder(entry: DatasetEntry, folder: Path) -> dict[str, tuple[RowFile, ...]] | None:
    """Return split -> its files, as `datasets` finds them in a folder; None if they are not JSON, CSV or text."""
    if entry.ds_type is None and entry.data_files is None:
        _require_one_kind(entry, folder)
    builder = _folder_builder(entry, folder)
    kind = type(builder).__module__.rpartition(".")[2]
    files_of_split = builder.config.data_files or {}
    if kind not in ROW_KINDS or not all(Path(file).is_file() for files in files_of_split.values() for file in files):
        return None
    return {
        str(split): tuple(_open_row_file(entry, Path(file), kind) for file in files)
        for split, files in files_of_split.items()
    }


def _folder_builder(entry: DatasetEntry, folder: Path) -> "datasets.DatasetBuilder":
    import datasets

    names = data_file_names(entry)
    if entry.ds_type is not None:
        return datasets.load_dataset_builder(entry.ds_type, data_dir=str(folder), data_files=names)
    return datasets.load_dataset_builder(str(folder), entry.name, data_files=names)


def data_file_names(entry: DatasetEntry) -> Any:
    """Return `data_files` as `datasets` takes it: a list, a name, a dict by split, or None."""
    return list(entry.data_files) if isinstance(entry.data_files, tuple) else entry.data_files


def _require_one_kind(entry: DatasetEntry, folder: Path) -> None:
    """Raise DataError if a folder holds files of several kinds: `datasets` would silently read the most frequent."""
    names_of_kind: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        kind = _BUILDERS.get(Path(name.lower().removesuffix(".gz")).suffix)
        is_hidden = any(part.startswith((".", "_")) for part in Path(name).parts)
        if kind is not None and file.is_file() and not is_hidden and file.name not in _METADATA_FILES:
            names_of_kind.setdefault(kind, []).append(name)
    if len(names_of_kind) > 1:
        some = {kind: ", ".join(names[:3]) + ", ..." * (len(names) > 3) for kind, names in names_of_kind.items()}
        listed = "\n".join(f"  {kind}: {names}" for kind, names in some.items())
        first = next(iter(names_of_kind.values()))[0]
        raise DataError(
            f"'{entry.path}' holds files of several kinds, of which one would be read:\n{listed}\n"
            f"Name those to read (`data_files: ['{first}']`), each kind in an entry of its own."
        )


def _open_row_file(entry: DatasetEntry, path: Path, kind: str) -> RowFile:
    if path.stat().st_size == 0:
        raise DataError(f"'{entry.path if path.name in entry.path else path}' is empty (0 bytes).")
    return local_file(path, file_kind(entry, kind))


def file_kind(entry: DatasetEntry, kind: str) -> FileKind:
    """Return how a file of this kind (of ROW_KINDS) is split into rows: text as lines, unless by document."""
    return "document" if kind == "text" and entry.sample_by == "document" else cast("FileKind", kind)


def builder_of_name(entry: DatasetEntry, name: str) -> str:
    """Return the builder of `datasets` for a file's ending, such as "json".

    Raises DataError for a local file of another ending; a hub dataset without one is taken for JSON.
    """
    plain = name.partition("?")[0] if is_address(name) else name
    suffix = Path(plain.lower().removesuffix(".gz")).suffix
    if suffix not in _BUILDERS and (looks_local(name) or Path(entry.path).expanduser().is_file()):
        raise DataError(
            f"'{entry.path}' ends with '{suffix}'; a data file ends with {', '.join(DATA_SUFFIXES)}.\n"
            "Or say what is in it: `ds_type: json`."
        )
    return _BUILDERS.get(suffix, "json")


def hub_urls(entry: DatasetEntry, files: list[str] | str) -> list[str]:
    """Return the hf:// URLs of files of a hub dataset, at the entry's revision."""
    revision = f"@{entry.revision}" if entry.revision else ""
    return [f"hf://datasets/{entry.path}{revision}/{file}" for file in ([files] if isinstance(files, str) else files)]


def is_saved_to_disk(path: Path) -> bool:
    """Return whether `datasets`' save_to_disk wrote this folder."""
    return path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())


def split_names(entry: DatasetEntry) -> list[str]:
    """Return the names in the entry's `split`, without slices: "train[:10%]+test" -> ["train", "test"]."""
    return [re.split(r"[\[(]", part.strip())[0] for part in entry.split.split("+")]


def first_split(entry: DatasetEntry) -> str:
    """Return the first name in the entry's `split`."""
    return split_names(entry)[0]


def require_split(entry: DatasetEntry, name: str, splits: dict[str, tuple[RowFile, ...]]) -> None:
    """Raise DataError if there is no split of this name."""
    if name not in splits:
        raise DataError(f"'{entry.path}' has no split '{name}'. Its splits are: {', '.join(splits)}.")
