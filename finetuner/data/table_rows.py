"""Rows of tables (Parquet, Arrow, `datasets`), without the keys that the table filled in.

A table gives every struct of a column the keys of all its structs: {"a": 1} and {"b": 2} come back as {"a": 1, "b":
None} and {"a": None, "b": 2}. Such a null is taken away, wherever it is inside a column. Whether an author wrote it
cannot be told; rows of JSON files, where it can, are left as they are. A column that is null stays null.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

Cleaner = Callable[[Any], Any]


def cell_cleaners(features: "datasets.Features | None") -> dict[str, Cleaner] | None:
    """Return a function for each column that holds structs; None if the types of the columns are not known."""
    if features is None:
        return None
    found = {name: _cleaner(feature) for name, feature in features.items()}
    return {name: clean for name, clean in found.items() if clean is not None}


def _cleaner(feature: Any) -> Cleaner | None:
    """Return what takes nulls out of values of a type; None if the type has no structs.

    A type that stores JSON as text has no structs: its values are as they were written.
    """
    import datasets

    if isinstance(feature, dict):
        return _struct_cleaner({name: _cleaner(inner) for name, inner in feature.items()})
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _list_cleaner(_cleaner(feature.feature))
    if isinstance(feature, list):
        return _list_cleaner(_cleaner(feature[0]) if feature else None)
    return None


def _struct_cleaner(cleaners: Mapping[str, Cleaner | None]) -> Cleaner:
    inner = {name: clean for name, clean in cleaners.items() if clean is not None}

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: inner[name](cell) if name in inner else cell for name, cell in value.items() if cell is not None}

    return clean


def _list_cleaner(inner: Cleaner | None) -> Cleaner | None:
    if inner is None:
        return None

    def clean(value: Any) -> Any:
        return [inner(item) for item in value] if isinstance(value, list) else value

    return clean


def rows_of_columns(columns: Mapping[str, Sequence[Any]], cleaners: Mapping[str, Cleaner]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table that is given column by column."""
    cleaned: list[Iterable[Any]] = [
        map(cleaners[name], cells) if name in cleaners else cells for name, cells in columns.items()
    ]
    names = list(columns)
    return (dict(zip(names, row, strict=True)) for row in zip(*cleaned, strict=True))


def clean_row(row: Mapping[str, Any], cleaners: Mapping[str, Cleaner] | None) -> Mapping[str, Any]:
    """Return one row. `cleaners`: from cell_cleaners; None cleans every dict in the row."""
    if cleaners is None:
        return {name: _without_nulls(cell) for name, cell in row.items()}
    if not cleaners:
        return row
    return {name: cleaners[name](cell) if name in cleaners else cell for name, cell in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
