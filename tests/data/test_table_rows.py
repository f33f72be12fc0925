"""A table's filling-in is taken away, and nothing else; rows of JSON files keep the nulls that their author wrote."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.data.sources import TableSource, load_source
from finetuner.data.streaming_source import DEFAULT_RETRY, START, StreamingSource
from finetuner.data.table_rows import clean_row
from finetuner.recipe.sections import DatasetEntry

NULL_ARGUMENT = {
    "messages": [
        {"role": "user", "content": "Find cats"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"q": "x", "n": None}}]},
    ],
    "tools": [{"function": {"name": "f", "parameters": {"default": None, "enum": ["a", None]}}}],
    "text": "t",
    "system": None,
}  # fmt: skip
OTHER = {
    "messages": [{"role": "assistant", "content": "c", "tool_calls": [{"name": "g", "arguments": {"z": 1}}]}],
    "tools": [],
    "text": "u",
    "system": "s",
}  # fmt: skip


def rows_of(path: object, **keys: Any) -> list[Any]:
    """The rows of an entry, loaded and streamed."""
    entry = DatasetEntry.model_validate({"path": str(path), "type": "completion"} | keys)
    rows = [placed.row for batch in load_source(entry, Path("unused")).batches(7) for placed in batch]
    stream, streamed = StreamingSource(entry, START, Path("unused"), DEFAULT_RETRY), list[Any]()
    while len(streamed) < len(rows):
        streamed += [placed.row for placed, _ in stream.take(16)]
    assert streamed[: len(rows)] == rows
    return rows


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_of_json_keep_every_null(tmp_path: Path, as_list: bool) -> None:
    rows = [NULL_ARGUMENT, OTHER]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))
    assert rows_of(path) == rows


def test_rows_of_tables_lose_what_the_table_filled_in(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([NULL_ARGUMENT, OTHER])
    pq.write_table(table, tmp_path / "rows.parquet")
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(tmp_path / "saved")
    call = {"name": "f", "arguments": {"q": "x"}}
    expected = [
        NULL_ARGUMENT
        | {
            "messages": [NULL_ARGUMENT["messages"][0], {"role": "assistant", "tool_calls": [call]}],
            "tools": [{"function": {"name": "f", "parameters": {"enum": ["a", None]}}}],
        },
        OTHER,
    ]
    for place in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert rows_of(place) == expected, "nulls of lists and of columns stay"


def test_json_that_a_table_holds_as_text_is_what_its_author_wrote(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "tools": datasets.List(datasets.Json())})
    rows = [{"text": "t", "tools": [{"default": None}, {"other": 1}]}]
    dataset = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == rows


def test_types_of_columns_do_not_matter(tmp_path: Path) -> None:
    struct = pa.struct({"a": pa.int64(), "b": pa.int64()})
    table = pa.table(
        {
            "text": pa.array(["a", "b", "a"]).dictionary_encode(),
            "large": pa.array(["x", None, "z"], pa.large_string()),
            "many": pa.array([[{"a": 1, "b": None}], None, []], pa.large_list(struct)),
            "none": pa.nulls(3),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == [
        {"text": "a", "large": "x", "many": [{"a": 1}], "none": None},
        {"text": "b", "large": None, "many": None, "none": None},
        {"text": "a", "large": "z", "many": [], "none": None},
    ]


KEYS = st.sampled_from("abc")
DEEP = st.lists(st.dictionaries(KEYS, st.lists(st.dictionaries(KEYS, st.integers(0, 3)))))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.fixed_dictionaries({"text": st.just("t"), "deep": DEEP}), min_size=1, max_size=4))
def test_a_row_without_nulls_comes_through_a_table_as_it_was(rows: list[dict[str, Any]]) -> None:
    table = TableSource(DatasetEntry(path="x", type="completion"), datasets.Dataset(pa.Table.from_pylist(rows)))
    read = [placed.row for batch in table.batches(3) for placed in batch]
    assert read == rows


def test_without_types_every_struct_is_cleaned() -> None:
    row = {"a": None, "b": {"c": None, "d": [{"e": None, "f": 1}, None]}}
    assert clean_row(row, None) == {"a": None, "b": {"d": [{"f": 1}, None]}}
    assert clean_row(row, {}) is row


def test_json_that_datasets_reads_keeps_the_nulls_of_objects_whose_keys_differ(tmp_path: Path) -> None:
    """As the JSON files of a hub dataset are read: docs/data.md says what becomes of their nulls."""

    def read(arguments: list[dict[str, Any]]) -> list[Any]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(json.dumps({"text": "t", "call": [{"arguments": one}]}) for one in arguments))
        table = datasets.load_dataset("json", data_files=str(path), split="train")
        source = TableSource(DatasetEntry(path="x", type="completion"), table)
        return [placed.row["call"][0]["arguments"] for batch in source.batches(3) for placed in batch]  # type: ignore[index]

    assert read([{"q": "x", "n": None}, {"z": 1}]) == [{"q": "x", "n": None}, {"z": 1}]
    assert read([{"q": "x", "n": None}, {"q": "y", "n": 1}]) == [{"q": "x"}, {"q": "y", "n": 1}]
