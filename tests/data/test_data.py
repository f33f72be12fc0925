"""Files become documents, each row is accounted for, and what cannot be read is said in a few lines."""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.rows import alpaca_rows, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.documents import CUT, SPLIT, SPLIT_IN_PART, TOO_LONG, UNTRAINED
from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData
from finetuner.data.sources import load_source
from finetuner.data.token_store import IGNORE_INDEX, TokenStore
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def prepared(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreparedData]:
    """prepared(*paths, key=value) -> what becomes of these files of alpaca rows."""

    def of(*paths: Path, seed: int = 0, **keys: Any) -> PreparedData:
        entries = [{"path": str(path), "type": "alpaca"} for path in paths]
        section = DataSection.model_validate(
            {"datasets": entries, "sequence_len": 4096, "max_dropped_fraction": 1.0} | keys
        )
        return prepare_documents(section, tokenizer, seed)

    return of


def documents(store: TokenStore) -> list[tuple[bytes, bytes]]:
    return [(ids.tobytes(), labels.tobytes()) for ids, labels in map(store.document, range(len(store)))]


def row(**cells: Any) -> dict[str, Any]:
    return {"instruction": "Say it.", "output": "it"} | cells


# --- formats of files ---


def test_one_table_in_four_formats_gives_the_same_documents(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    odd = ["None", "NA", "null", "nan", "", 'a "quoted, comma"', "two\nlines", "1.5 apples", "🦊"]
    rows = alpaca_rows(8) + [row(input=text, output=text) for text in odd]
    jsonl = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    expected = documents(prepared(jsonl).train)
    assert len(set(expected)) == len(rows)
    for suffix in ("json", "parquet", "csv"):
        assert documents(prepared(tmp_path / f"rows.{suffix}").train) == expected, suffix


def test_a_file_may_have_any_name_and_a_folder_stands_for_its_files(
    prepared: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = alpaca_rows(5)
    expected = documents(prepared(write_rows(tmp_path / "plain.jsonl", rows)).train)
    assert documents(prepared(write_rows(tmp_path / "odd [1] *?.jsonl", rows)).train) == expected
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl", rows)
    assert documents(prepared(tmp_path / "folder").train) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(prepared(Path("~/plain.jsonl")).train) == expected
    assert documents(prepared(Path("~/folder")).train) == expected


def test_one_changed_byte_gives_the_new_rows(prepared: Callable[..., PreparedData], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(output="x")])
    before = documents(prepared(path).train)
    assert documents(prepared(path).train) == before
    times = path.stat()
    path.write_text(path.read_text().replace('"x"', '"y"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` or an unpacked archive leaves it
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    after = documents(prepared(path).train)
    assert after != before
    assert after == documents(prepared(write_rows(tmp_path / "other.jsonl", [row(output="y")])).train)


def test_progress_reaches_the_number_of_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(1200))
    entry = {"path": str(path), "type": "alpaca"}
    seen: list[tuple[int, int]] = []
    prepare_documents(DataSection(datasets=[entry]), tokenizer, 0, lambda done, total: seen.append((done, total)))
    assert seen == [(512, 1200), (1024, 1200), (1200, 1200)]


# --- what cannot be used ---

ROW = json.dumps(row())
UNUSABLE: dict[str, tuple[str, str | bytes, str]] = {
    "empty file": ("a.jsonl", "", "is empty (0 bytes)"),
    "empty list": ("a.json", "[]", "has no rows: there is nothing to learn from"),
    "blank lines": ("a.jsonl", "\n\n", "has no rows"),
    "head of a table only": ("a.csv", "instruction,output\n", "has no rows"),
    "half a file": ("a.json", '[{"instruction": "a", ', "row 0 is broken JSON: expecting property name"),
    "half a list": ("a.json", f"[{ROW}, {ROW}", "row 1 is broken JSON: expecting ',' or ']'"),
    "a list that breaks": ("a.json", f"[{ROW}, {{'a': 1}}, {ROW}]", "row 1 is broken JSON: expecting property name"),
    "an object over lines": (
        "a.json",
        '{\n "data": [1]\n}\n',
        "Its columns are: data.",
    ),
    "a broken line": ("a.jsonl", f'{ROW}\n{{"instruction":\n', "row 1: line 2 is broken JSON: expecting value at"),
    "a number": ("a.json", "5", "row 0: line 1 holds int 5, but must be an object"),
    "random bytes": ("a.json", bytes(range(256)), "row 0: line 1 is broken JSON"),
    "no parquet": ("a.parquet", b"PAR1 and so on", "Parquet magic bytes not found"),
    "half a surrogate": (
        "a.jsonl",
        '{"instruction": "a", "output": "\\ud800"}\n',
        "line 1 has half a character, \\ud800",
    ),
    "half a surrogate in a list": ("a.json", '[{"instruction": "a", "output": "\\uD800"}]', "it has half a character"),
    "another encoding": (
        "a.csv",
        "instruction,output\na,\xe9\n".encode("latin-1"),
        "row 0: line 2 is not UTF-8 text: byte 0xe9 in column 'output'",
    ),
    "another encoding of JSON": ("a.jsonl", '{"a": "é"}'.encode("latin-1"), "line 1 is not UTF-8 text: byte 0xe9 at 7"),
    "another encoding of a list": ("a.json", '[{"a": "é"}]'.encode("latin-1"), "is not UTF-8 text: byte 0xe9"),
    "no gzip": ("a.jsonl.gz", b"\x1f\x8bnothing of the kind", "it is packed, and cut off or damaged"),
    "a number for a row": ("a.jsonl", f"{ROW}\n17\n", "row 1: line 2 holds int 17, but must be an object"),
    "a row without a column": (
        "a.jsonl",
        f'{ROW}\n{{"instruction": "a"}}\n',
        "row 1: it has no column 'output'; its co",
    ),
    "another suffix": ("a.xml", ROW, "ends with '.xml'; a data file ends with .json, .jsonl, .csv, .parquet,"),
    "no suffix": ("a", ROW, "ends with ''"),
    "other columns": ("a.jsonl", '{"question": "a", "answer": "b"}\n', "Its columns are: question, answer."),
    "no output": ("a.jsonl", '{"instruction": "a"}\n', "has no column 'output', which `type: alpaca` needs."),
    "commas without quotes": (
        "a.csv",
        "instruction,output\nGo, now,yes\n",
        "row 0: line 2 has 3 fields, and the first line 2 names. Quote the texts with commas",
    ),
    "commas in one row": ("a.csv", "instruction,output\na,b\nc,d,e\n", "row 1: line 3 has 3 fields"),
    "a null": (
        "a.jsonl",
        f"{ROW}\n" + json.dumps(row(output=None)),
        "row 1: column 'output' holds nothing, but must be",
    ),
    "a null instruction": ("a.jsonl", json.dumps(row(instruction=None)), "row 0: column 'instruction' holds nothing"),
    "numbers": ("a.jsonl", json.dumps(row(output=42)), "row 0: column 'output' holds int 42, but must be text"),
    "a number among texts": ("a.json", json.dumps([row(), row(output=7)]), "row 1: column 'output' holds"),
    "zero for an input": ("a.jsonl", json.dumps(row(input=0)), "row 0: column 'input' holds int 0, but must be text"),
    "a list": ("a.jsonl", json.dumps(row(output=["a"])), "column 'output' holds list ['a']"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_refused_in_a_few_lines(
    prepared: Callable[..., PreparedData], tmp_path: Path, name: str
) -> None:
    file_name, content, message = UNUSABLE[name]
    path = tmp_path / file_name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        prepared(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert len(text.splitlines()) <= 4
    assert len(text) < 700


@pytest.mark.parametrize(
    "name", ["no-such-owner/no-such-data", "no_such_data", "a b c", "./no/such/folder", "/no.json"]
)
def test_names_that_lead_nowhere_are_refused_without_a_network(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the dataset"):
        load_source(DatasetEntry(path=name, type="alpaca"), tmp_path)


def test_a_chat_column_of_another_name_is_asked_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"conversations": [{"role": "user", "content": "a"}]}])
    with pytest.raises(DataError, match="has no column 'messages'") as caught:
        load_source(DatasetEntry(path=str(path), type="chat_template"), tmp_path)
    assert "Its columns are: conversations.\nWrite `field_messages: conversations`." in str(caught.value)
    named = DatasetEntry(path=str(path), type="chat_template", field_messages="conversations")
    assert len(load_source(named, tmp_path)) == 1


# --- lengths ---


def test_longer_documents_are_dropped_cut_or_refused_as_the_recipe_says(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    rows = [row(output="a " * n) for n in (1, 40, 1, 80)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    whole = prepared(path)
    lengths = [whole.train.length(i) for i in range(4)]
    assert lengths[0] == lengths[2] < lengths[1] < lengths[3]
    assert whole.counts == {}

    fits = prepared(path, sequence_len=lengths[1])
    assert documents(fits.train) == documents(whole.train)[:3]
    assert fits.counts == {TOO_LONG: 1}
    assert fits.notes == ["1 rows longer than sequence_len"]

    limit = lengths[1] - 1
    cut = prepared(path, sequence_len=limit, excess_length_strategy="truncate")
    assert [cut.train.length(i) for i in range(4)] == [lengths[0], limit, lengths[0], limit]
    assert cut.counts == {CUT: 2}
    for i in range(4):
        for kept, before in zip(cut.train.document(i), whole.train.document(i), strict=True):
            assert (kept == before[:limit]).all()

    with pytest.raises(DataError, match=f"row 1: {lengths[1]} tokens, but sequence_len is {limit}"):
        prepared(path, sequence_len=limit, excess_length_strategy="raise")


def test_parts_of_a_split_row_without_a_trained_token_are_told_of(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(), row(instruction="a " * 200), row(output="a " * 200)])
    length = prepared(path).train.length(0)
    parts = prepared(path, sequence_len=length, excess_length_strategy="split")
    assert parts.counts == {SPLIT: 2, SPLIT_IN_PART: 1}  # the first of them begins with a prompt alone
    assert (parts.train.labels != IGNORE_INDEX).sum() == (prepared(path).train.labels != IGNORE_INDEX).sum()


def test_rows_without_a_trained_token_are_counted_and_left_out(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(), row(instruction="a " * 100), row()])
    length = prepared(path).train.length(0)
    cut = prepared(path, sequence_len=length, excess_length_strategy="truncate")
    assert len(cut.train) == 2
    assert cut.counts == {CUT: 1, UNTRAINED: 1}
    assert cut.notes == ["1 rows cut to sequence_len", "1 rows without a trained token"]


def test_nothing_left_is_an_error_that_says_where_the_rows_went(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(7))
    with pytest.raises(DataError, match=r"no row is left to train on, of 7: 7 rows longer than sequence_len.\nRaise"):
        prepared(path, sequence_len=3)
    with pytest.raises(DataError, match=r"val_set_size: 7.0 holds out all 7 rows. Make it smaller."):
        prepared(path, val_set_size=7.0)
    short = write_rows(tmp_path / "short.jsonl", [row()])
    test = [{"path": str(path), "type": "alpaca"}]
    with pytest.raises(DataError, match="no held-out row is left: 7 rows longer"):
        prepared(short, test_datasets=test, sequence_len=prepared(short).train.length(0))


# --- held-out rows ---


@pytest.mark.parametrize(
    ("size", "rows", "held_out"),
    [(0.0, 50, 0), (0.1, 50, 5), (0.1, 51, 6), (0.001, 50, 1), (0.07, 100, 7), (1, 50, 1), (13, 50, 13), (0.99, 3, 3)],
)
def test_held_out_rows_are_a_share_rounded_up_or_a_number(
    prepared: Callable[..., PreparedData], tmp_path: Path, size: float, rows: int, held_out: int
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(rows))
    if held_out == rows:
        with pytest.raises(DataError, match="holds out all 3 rows"):
            prepared(path, val_set_size=size)
        return
    split = prepared(path, val_set_size=size)
    assert (len(split.train), len(split.held_out)) == (rows - held_out, held_out)
    whole = documents(prepared(path).train)
    assert Counter(documents(split.train)) + Counter(documents(split.held_out)) == Counter(whole)
    kept = set(documents(split.train))
    assert documents(split.train) == [document for document in whole if document in kept], "the file's order is kept"


def test_held_out_rows_depend_on_the_seed_and_nothing_else(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(60))
    first = documents(prepared(path, val_set_size=0.2).held_out)
    assert documents(prepared(path, val_set_size=0.2).held_out) == first
    assert documents(prepared(path, val_set_size=0.2, seed=1).held_out) != first
    # which rows are held out does not shift when other rows are dropped for their length
    whole = prepared(path).train
    middle = sorted(whole.length(i) for i in range(60))[30]
    shorter = prepared(path, val_set_size=0.2, sequence_len=middle)
    assert shorter.counts[TOO_LONG] > 0
    assert set(documents(shorter.held_out)) <= set(first)
    assert not set(documents(shorter.train)) & set(first)


def test_test_datasets_are_held_out_and_datasets_are_joined_in_order(
    prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    a, b, test = (write_rows(tmp_path / f"{n}.jsonl", alpaca_rows(n)) for n in (3, 4, 5))
    joined = prepared(b, a, test_datasets=[{"path": str(test), "type": "alpaca"}])
    assert documents(joined.train) == documents(prepared(b).train) + documents(prepared(a).train)
    assert documents(joined.held_out) == documents(prepared(test).train)


# --- the store ---


def test_the_store_counts_what_a_loss_counts() -> None:
    import numpy as np
    import torch

    generator = np.random.default_rng(0)
    docs = [generator.integers(0, 9, size).astype(np.int32) for size in (5, 1, 0, 7, 2)]
    pairs = [(ids, np.where(generator.random(len(ids)) < 0.5, ids, IGNORE_INDEX).astype(np.int32)) for ids in docs]
    pairs[0][1][0] = pairs[1][1][0] = 3  # first tokens, which no position predicts
    store = TokenStore.of(pairs)
    assert [store.length(i) for i in range(len(store))] == [5, 1, 0, 7, 2]
    assert store.num_tokens == 15
    for i, (ids, labels) in enumerate(pairs):
        assert (store.document(i)[0] == ids).all()
        assert (store.document(i)[1] == labels).all()
    summed = sum(
        torch.nn.functional.cross_entropy(
            torch.zeros(len(labels) - 1, 9),
            torch.from_numpy(labels[1:]).long(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        ).item()
        for _, labels in pairs
        if len(labels) > 1
    )
    assert store.num_trained == round(summed / np.log(9))
    empty = TokenStore.of([])
    assert (len(empty), empty.num_tokens, empty.num_trained) == (0, 0, 0)
