"""The first row of a dataset on this disk, for tools whose recipes leave the kind of rows to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuner.data.row_files import Row
from finetuner.data.source_files import builder_of_name, find_row_files, first_split, is_saved_to_disk
from finetuner.data.sources import parse_record
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry


def first_row_at_hand(entry: Mapping[str, Any]) -> Row | None:
    """Return the first row of an entry of `datasets`, of which `type` is not known yet.

    None if the dataset is not a file or folder here, or its first row cannot be read.
    """
    path = Path(str(entry.get("path"))).expanduser()
    if not path.exists():
        return None
    try:
        return _first_row(DatasetEntry.model_validate({**entry, "type": None}), path)
    except Exception:  # a broken file is named, with its place, as soon as its rows are used
        return None


def _first_row(entry: DatasetEntry, path: Path) -> Row | None:
    splits = find_row_files(entry, path.parent)
    if splits is None:
        return _first_of_table(entry, path)
    for file in splits.get(first_split(entry), ()):
        for record in file.records():
            row = parse_record(file, record)
            return None if isinstance(row, DataError) else row
    return None


def _first_of_table(entry: DatasetEntry, path: Path) -> Row | None:
    """Return the first row of Parquet, of Arrow, or of a folder of `save_to_disk`."""
    import datasets

    if is_saved_to_disk(path):
        saved = datasets.load_from_disk(str(path))
        rows: Any = saved[first_split(entry)] if isinstance(saved, datasets.DatasetDict) else saved
    elif path.is_file():
        kind = entry.ds_type or builder_of_name(entry, entry.path)
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    else:
        rows = datasets.load_dataset(str(path), entry.name, split=first_split(entry), streaming=True)
    return next(iter(rows), None)
