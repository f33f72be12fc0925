"""Find the files of a dataset entry, and their kind: which finetuner reads itself, and which `datasets` reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from finetuner.data.fetch import fetch, is_address
from finetuner.data.file_heads import HEAD_BYTES, require_rows
from finetuner.data.folder_files import (
    Splits,
    all_files_in,
    card_configs,
    data_files_in,
    files_by_name,
    files_of_card,
    matches,
)
from finetuner.data.json_values import MessageLists
from finetuner.data.row_files import FileKind, RowFile, local_files
from finetuner.data.unpacking import head_of, is_zip, zip_members
from finetuner.errors import DataError, RowFileError
from finetuner.recipe.rules import PACKING_SUFFIXES, data_suffix, looks_local
from finetuner.recipe.sections import DatasetEntry

ROW_KINDS = ("json", "csv", "text")  # what finetuner reads itself, by the names of the builders of `datasets`
TABLE_KINDS = ("parquet", "arrow")
_T = TypeVar("_T")
_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
    ".tsv": "csv", ".ndjson": "json",
}  # fmt: skip


class LocalFiles(NamedTuple):
    """The files of an entry on this disk by split, and their kind (of ROW_KINDS or TABLE_KINDS)."""

    kind: str
    splits: Splits


def files_on_disk(entry: DatasetEntry) -> LocalFiles | None:
    """Return the files of an entry that names a file, a folder or, as `path: json`, `data_files` on this disk.

    None for an address, the hub, and a folder of `save_to_disk`. A file, and files that the recipe names, are the split
    that the entry asks for. Raises DataError if a folder holds files of several kinds, or a name is no file.
    """
    path = Path(entry.path).expanduser()
    if path.is_file():
        return LocalFiles(entry.ds_type or kind_of_file(entry, path), {first_split(entry): [path]})
    if path.is_dir():
        return None if is_saved_to_disk(path) else _of_one_kind(entry, path, _folder_splits(entry, path))
    names = file_names(entry)
    if entry.path not in (*ROW_KINDS, *TABLE_KINDS) or not names or any(map(is_address, names)):
        return None
    return LocalFiles(entry.path, {first_split(entry): _named_files(entry, Path(), names)})


def _folder_splits(entry: DatasetEntry, folder: Path) -> Splits:
    names = file_names(entry)
    if names:
        return {first_split(entry): _named_files(entry, folder, names)}
    configs = card_configs(folder)
    if configs:
        return files_of_card(entry, folder, configs)
    if entry.name is not None:
        raise DataError(f"'{entry.path}' has no README.md that names configurations. Remove `name: {entry.name}`.")
    files = data_files_in(folder)
    if entry.ds_type is not None:
        files = [path for path in files if kind_of_file(entry, path) == entry.ds_type] or all_files_in(folder)
    else:
        _require_one_kind(entry, folder, files)
    return files_by_name(entry, folder, files)


def _named_files(entry: DatasetEntry, folder: Path, names: list[str]) -> list[Path]:
    """Return the files of the entry's `data_files`, in their order."""
    found: list[Path] = []
    for name in names:
        paths = matches(folder, str(Path(name).expanduser()) if name.startswith("~/") else name)
        if not paths:
            there = [str(path.relative_to(folder)) for path in data_files_in(folder)] if folder != Path() else []
            holds = f" It holds: {', '.join(there[:5])}{', ...' * (len(there) > 5)}." if there else ""
            raise DataError(f"data_files names no file: '{name}' (seen from '{folder.resolve()}').{holds}")
        found += [path for path in paths if path not in found]
    return found


def _of_one_kind(entry: DatasetEntry, folder: Path, splits: Splits) -> LocalFiles:
    files = [path for paths in splits.values() for path in paths]
    if not files:
        raise DataError(f"'{entry.path}' has no data file ({', '.join(_BUILDERS)}).")
    if entry.ds_type is not None:
        return LocalFiles(entry.ds_type, splits)
    _require_one_kind(entry, folder, files)
    return LocalFiles(kind_of_file(entry, files[0]), splits)


def _require_one_kind(entry: DatasetEntry, folder: Path, files: list[Path]) -> None:
    """Raise DataError if the files are of several kinds, which no one reader reads."""
    names_of_kind: dict[str, list[str]] = {}
    for file in files:
        name = str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
        names_of_kind.setdefault(kind_of_file(entry, file), []).append(name)
    if len(names_of_kind) > 1:
        some = {kind: ", ".join(names[:3]) + ", ..." * (len(names) > 3) for kind, names in names_of_kind.items()}
        listed = "\n".join(f"  {kind}: {names}" for kind, names in some.items())
        first = next(iter(names_of_kind.values()))[0]
        raise DataError(
            f"'{entry.path}' holds files of several kinds, of which one would be read:\n{listed}\n"
            f"Name those to read (`data_files: ['{first}']`), each kind in an entry of its own."
        )


def find_row_files(entry: DatasetEntry, fetched: Path) -> dict[str, tuple[RowFile, ...]] | None:
    """Return split -> its files of JSON, CSV or text; None for an entry that only `datasets` can read.

    Files at an address are downloaded into `fetched`, and are the split that the entry asks for. Raises DataError if a
    file is empty, or a folder holds files of several kinds.
    """
    if is_address(entry.path):
        kind = entry.ds_type or builder_of_name(entry, entry.path)
        if kind not in ROW_KINDS:
            return None
        found: LocalFiles | None = LocalFiles(kind, {first_split(entry): fetch(entry.path, fetched)})
    else:
        found = files_on_disk(entry)
    if found is None or found.kind not in ROW_KINDS:
        return None
    return {
        split: tuple(one for path in paths for one in _open_row_files(entry, path, found.kind))
        for split, paths in found.splits.items()
    }


def file_names(entry: DatasetEntry) -> list[str]:
    """Return the names in the entry's `data_files`."""
    named = entry.data_files
    return [named] if isinstance(named, str) else list(named or ())


def data_file_names(entry: DatasetEntry) -> Any:
    """Return `data_files` as `datasets` takes it: a list, a name, or None."""
    return list(entry.data_files) if isinstance(entry.data_files, tuple) else entry.data_files


def _open_row_files(entry: DatasetEntry, path: Path, kind: str) -> tuple[RowFile, ...]:
    if path.stat().st_size == 0:
        raise DataError(f"'{entry.path if path.name in entry.path else path}' is empty (0 bytes).")
    try:
        return local_files(path, file_kind(entry, kind), message_lists(entry))
    except RowFileError as error:
        raise DataError(f"{path}: {error}.") from None


def message_lists(entry: DatasetEntry) -> MessageLists | None:
    """Return which lists of a JSON file are one conversation of the entry; None if its rows hold no messages."""
    if entry.type != "chat_template":
        return None
    return MessageLists(entry.field_messages, frozenset({entry.message_property_mappings.role, "role", "from"}))


def require_tables(paths: list[Path], kind: str) -> None:
    """Raise DataError if a file of a table is something else, such as a pointer of Git LFS, or empty."""
    for path in paths:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head:
            raise DataError(f"'{path}' is empty (0 bytes).")
        if (kind == "parquet") == head.startswith(b"PAR1") and not head.startswith(b"version https://git-lfs"):
            continue
        try:
            require_rows(head, may_be_page=False)
        except RowFileError as error:
            raise DataError(f"{path}: {error}.") from None


def file_kind(entry: DatasetEntry, kind: str) -> FileKind:
    """Return how a file of this kind (of ROW_KINDS) is split into rows: text as lines, unless by document."""
    return "document" if kind == "text" and entry.sample_by == "document" else cast("FileKind", kind)


def kind_of_file(entry: DatasetEntry, path: Path) -> str:
    """Return the builder of `datasets` for a file on this disk: by its name, or by those in a zip archive."""
    if data_suffix(path.name) not in _BUILDERS and is_zip(path):
        try:
            return _BUILDERS.get(data_suffix(zip_members(path)[0]), "") or builder_of_name(entry, path.name)
        except RowFileError as error:
            raise DataError(f"{path}: {error}.") from None
    return builder_of_name(entry, str(path))


def builder_of_name(entry: DatasetEntry, name: str) -> str:
    """Return the builder of `datasets` for a file's ending, such as "json".

    Raises DataError for a local file of another ending; a hub dataset without one is taken for JSON.
    """
    suffix = data_suffix(name.partition("?")[0] if is_address(name) else name)
    if suffix in _BUILDERS:
        return _BUILDERS[suffix]
    path = Path(name).expanduser()
    if path.is_file():
        try:
            require_rows(head_of(path), may_be_page=False)
        except RowFileError as error:
            raise DataError(f"'{name}': {error}.") from None
    if looks_local(name) or path.is_file():
        raise DataError(
            f"'{name}' ends with '{Path(name).suffix}'; a data file ends with {', '.join(_BUILDERS)}; if it is text, "
            f"with {', '.join(PACKING_SUFFIXES)} behind it where it is packed.\n"
            "Or say what is in it: `ds_type: json`."
        )
    return "json"


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


def require_split(entry: DatasetEntry, name: str, splits: Mapping[str, _T]) -> _T:
    """Return the files of a split. Raises DataError if there is no split of this name."""
    if name not in splits:
        raise DataError(
            f"'{entry.path}' has no split '{name}'. Its splits are: {', '.join(splits)}.\n"
            f"Choose one: `split: {next(iter(splits), name)}`."
        )
    return splits[name]
