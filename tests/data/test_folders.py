"""The files of a folder: by its card, by their names, or as they are named; none is left out without a word."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.rows import write_rows
from transformers import AutoTokenizer

from finetuner.data.cache import prepare_once, source_facts
from finetuner.data.sources import load_source
from finetuner.data.streaming_source import DEFAULT_RETRY, START, StreamingSource
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, PackingSection
from finetuner.world import World


def texts(path: Path, *numbers: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"text {i}"} for i in numbers]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    return write_rows(path, rows)


def entry_of(path: object, **keys: Any) -> DatasetEntry:
    return DatasetEntry.model_validate({"path": str(path), "type": "completion"} | keys)


def numbers_of(path: object, **keys: Any) -> list[int]:
    """The numbers of the texts of an entry, loaded and streamed."""
    entry = entry_of(path, **keys)
    rows = [placed.row for batch in load_source(entry, Path("unused")).batches(7) for placed in batch]
    numbers = [int(row["text"].split()[1]) for row in rows]  # type: ignore[index]
    if "+" not in entry.split and "[" not in entry.split:
        stream, streamed = StreamingSource(entry, START, Path("unused"), DEFAULT_RETRY), list[int]()
        while len(streamed) < len(rows):
            streamed += [int(placed.row["text"].split()[1]) for placed, _ in stream.take(16)]  # type: ignore[index]
        assert streamed[: len(rows)] == numbers
    return numbers


def error_of(path: object, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        numbers_of(path, **keys)
    return str(caught.value)


NAMES = ["rows [v1] #2 (50%)", "[a-z]*", "what?", "числа 数据", 'a\'b "c"', "{x,y}", "$5", "!not", "~x", "a;b&c"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_name_is_a_name_whatever_signs_are_in_it(tmp_path: Path, name: str, suffix: str) -> None:
    folder = tmp_path / name
    texts(folder / f"{name}.{suffix}", 0, 1, 2)
    assert numbers_of(folder / f"{name}.{suffix}") == [0, 1, 2]
    assert numbers_of(folder) == [0, 1, 2]
    assert numbers_of(folder, data_files=f"{name}.{suffix}") == [0, 1, 2]
    assert numbers_of(folder, ds_type={"jsonl": "json"}.get(suffix, suffix)) == [0, 1, 2]
    texts(folder / f"train-{name}.{suffix}", 3)
    texts(folder / f"test-{name}.{suffix}", 4)
    (folder / f"{name}.{suffix}").unlink()
    assert numbers_of(folder) == [3]
    assert numbers_of(folder, split="test") == [4]
    assert numbers_of(folder, split="train+test[:50%]", data_files=None) in ([3], [3, 4])


LAYOUTS: list[tuple[dict[str, tuple[int, ...]], dict[str, list[int]]]] = [
    ({"a.jsonl": (0,), "b/c.jsonl": (1,)}, {"train": [0, 1]}),
    ({"train.jsonl": (0,), "test.jsonl": (1,), "dev.jsonl": (2,)}, {"train": [0], "test": [1], "validation": [2]}),
    ({"data/train.jsonl": (0,), "data/my-dev.jsonl": (1,)}, {"train": [0], "validation": [1]}),
    ({"train/a.jsonl": (0,), "train/b.jsonl": (1,), "eval/a.jsonl": (2,)}, {"train": [0, 1], "test": [2]}),
    ({"x_train/1.jsonl": (0,), "x_test/1.jsonl": (1,)}, {"train": [0], "test": [1]}),
    (
        {"data/train-00000-of-00001.jsonl": (0, 1), "data/more-00000-of-00001.jsonl": (2,)},
        {"train": [0, 1], "more": [2]},
    ),
    ({"a.jsonl": (0,), ".hidden/b.jsonl": (5,), "__pycache__/c.jsonl": (6,), "config.json": ()}, {"train": [0]}),
]  # fmt: skip


@pytest.mark.parametrize(("files", "splits"), LAYOUTS)
def test_splits_are_told_by_names_as_the_datasets_library_tells_them(
    tmp_path: Path, files: dict[str, tuple[int, ...]], splits: dict[str, list[int]]
) -> None:
    for name, numbers in files.items():
        texts(tmp_path / name, *numbers)
    for split, numbers in splits.items():
        assert numbers_of(tmp_path, split=split) == numbers
    theirs = datasets.load_dataset_builder(str(tmp_path)).config.data_files
    assert {split: [os.path.relpath(file, tmp_path) for file in theirs[split]] for split in theirs} == {
        split: [name for name, own in files.items() if set(own) & set(numbers)] for split, numbers in splits.items()
    }


def test_a_file_that_no_split_takes_is_named(tmp_path: Path) -> None:
    texts(tmp_path / "train.jsonl", 0)
    texts(tmp_path / "more.jsonl", 1)
    message = error_of(tmp_path)
    assert "others that would not be read: more.jsonl" in message
    assert "`data_files: ['train.jsonl', 'more.jsonl']`" in message
    assert numbers_of(tmp_path, data_files=["train.jsonl", "more.jsonl"]) == [0, 1]


def test_named_files_are_the_split_that_is_asked_for_and_may_be_patterns(tmp_path: Path) -> None:
    for i, name in enumerate(("a/1.jsonl", "a/2.jsonl", "a/b/3.jsonl", "test [1].jsonl")):
        texts(tmp_path / name, i)
    assert numbers_of(tmp_path, data_files="a/*.jsonl") == [0, 1]
    assert numbers_of(tmp_path, data_files="a/**") == [0, 1, 2]
    assert numbers_of(tmp_path, data_files=["test [1].jsonl"], split="test") == [3]
    assert numbers_of(tmp_path, data_files=["a/2.jsonl", "a/*.jsonl"]) == [1, 0], "in their order, none twice"
    assert numbers_of(tmp_path, data_files=str(tmp_path / "a/b/3.jsonl")) == [2]
    message = error_of(tmp_path, data_files="a/9.jsonl")
    assert "data_files names no file: 'a/9.jsonl'" in message
    assert "It holds: a/1.jsonl, a/2.jsonl, a/b/3.jsonl" in message
    (tmp_path / "empty").mkdir()
    assert "has no data file (.json, .jsonl" in error_of(tmp_path / "empty")
    assert "no README.md that names configurations. Remove `name: x`" in error_of(tmp_path, name="x")


# --- a clone from the hub ---

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: test
    path: [data/test-0.parquet, data/test-1.parquet]
- config_name: extra
  data_files: data/extra.jsonl
- config_name: folder
  data_dir: more
---
# Rows
"""


def clone(folder: Path, card: str = CARD) -> Path:
    texts(folder / "data/train-00000-of-00002.parquet", 0, 1)
    texts(folder / "data/train-00001-of-00002.parquet", 2)
    texts(folder / "data/test-0.parquet", 3)
    texts(folder / "data/test-1.parquet", 4)
    texts(folder / "data/extra.jsonl", 5, 6)
    texts(folder / "more/train.jsonl", 7)
    texts(folder / "more/test.jsonl", 8)
    (folder / "README.md").write_text(card)
    return folder


def test_a_clone_is_read_as_its_card_says(tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone [1]")
    assert numbers_of(folder) == [0, 1, 2]
    assert numbers_of(folder, split="test") == [3, 4]
    assert numbers_of(folder, split="test+train[:1]") == [3, 4, 0]
    assert numbers_of(folder, name="extra") == [5, 6]
    assert numbers_of(folder, name="folder", split="test") == [8]
    assert numbers_of(folder, data_files="data/extra.jsonl") == [5, 6]
    message = error_of(folder, name="extras")
    assert "no configuration 'extras'. Its README.md names: default, extra, folder. Did you mean 'extra'?" in message
    assert "has no split 'dev'. Its splits are: train, test." in error_of(folder, split="dev")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD.replace("config_name: default", "config_name: first"), "makes none the default: first, extra, folder"),
        (CARD.replace("data/extra.jsonl", "data/none-*.jsonl").replace("default", "d0").replace("extra", "default"),
         "names files of the split 'train' that are not there"),
        (CARD.replace("license: mit", "license: [mit"), "the head of .* cannot be read"),
        (CARD.replace("data/test-0.parquet, data/test-1.parquet", "data/extra.jsonl"), "files of several kinds"),
    ],
)  # fmt: skip
def test_a_card_that_does_not_say_what_to_read_is_an_error(tmp_path: Path, card: str, expected: str) -> None:
    assert re.search(expected, error_of(clone(tmp_path, card)))


def test_a_default_may_be_marked_and_a_single_configuration_is_one(tmp_path: Path) -> None:
    marked = CARD.replace("config_name: default", "config_name: first").replace(
        "config_name: extra\n", "config_name: extra\n  default: true\n"
    )
    assert numbers_of(clone(tmp_path / "a", marked)) == [5, 6]
    single = "---\nconfigs:\n- config_name: only\n  data_files: data/extra.jsonl\n---\n"
    assert numbers_of(clone(tmp_path / "b", single)) == [5, 6]
    without = tmp_path / "c"
    texts(without / "a.jsonl", 9)
    (without / "README.md").write_text("# no head\n---\nconfigs: 5\n")
    assert numbers_of(without) == [9]


# --- path: json ---


def test_a_kind_for_a_path_reads_the_named_files_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "a [1].jsonl", 0, 1)
    texts(tmp_path / "b.parquet", 2)
    assert numbers_of("json", data_files="a [1].jsonl") == [0, 1]
    assert numbers_of("json", data_files=[str(tmp_path / "a [1].jsonl")], split="test") == [0, 1]
    assert numbers_of("json", data_files="*.jsonl", split="train[:1]") == [0]
    assert numbers_of("parquet", data_files="b.parquet") == [2]
    assert "data_files names no file: 'c.jsonl'" in error_of("json", data_files="c.jsonl")
    (tmp_path / "nulls.jsonl").write_text('{"text": "a", "x": {"a": null}}\n{"text": "b", "x": [1, null]}\n')
    rows = [
        placed.row
        for batch in load_source(entry_of("json", data_files="nulls.jsonl"), tmp_path).batches(2)
        for placed in batch
    ]
    assert rows == [{"text": "a", "x": {"a": None}}, {"text": "b", "x": [1, None]}], "not through a table"


Edit = Callable[[Path], None]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("place", ["path: kind", "folder", "card"])
def test_a_byte_of_a_named_file_makes_another_cache(
    tmp_path: Path, tokenizer_folder: Path, suffix: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the size and the time of change stay."""
    monkeypatch.chdir(tmp_path)
    file = texts(tmp_path / f"rows/data.{suffix}", 10, 11)
    kind = {"jsonl": "json"}.get(suffix, suffix)
    keys: dict[str, Any] = {"path": kind, "data_files": f"rows/data.{suffix}"} if "kind" in place else {"path": "rows"}
    if place == "card":
        (tmp_path / "rows/README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: data.{suffix}\n---\n")
    section = DataSection.model_validate(
        {"datasets": [keys | {"type": "completion"}], "dataset_prepared_path": str(tmp_path / "prepared")}
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def learned() -> str:
        prepared = prepare_once(section, PackingSection(), tokenizer, 0, World())
        return " ".join(tokenizer.decode(prepared.train.document(i)[0]) for i in range(len(prepared.train)))

    assert "text 11" in learned()
    facts, stat = source_facts(section.datasets[0], section), file.stat()
    shutil.copy(texts(tmp_path / f"other/data.{suffix}", 10, 12), file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert source_facts(section.datasets[0], section) != facts
    assert "text 12" in learned() and "text 11" not in learned()


def test_a_card_that_chooses_other_files_makes_another_cache(tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    section = DataSection.model_validate(
        {"datasets": [{"path": str(folder), "type": "completion"}], "dataset_prepared_path": str(tmp_path / "p")}
    )
    (tmp_path / "p/files").mkdir(parents=True)
    before = source_facts(section.datasets[0], section)
    (folder / "README.md").write_text(
        CARD.replace("config_name: default", "config_name: first").replace("extra", "default")
    )
    texts(folder / "data/default.jsonl", 5)
    assert json.dumps(source_facts(section.datasets[0], section)) != json.dumps(before)
