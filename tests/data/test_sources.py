"""Rows from wherever they lie, mixed as the recipe says, with no row learned that is held out."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.places import ROOT
from support.rows import RecipeWriter, alpaca_rows, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.cli import main
from finetuner.console import Screen
from finetuner.data import encoding
from finetuner.data import prepare as preparation
from finetuner.data.cache import SETTLED_NS, prepare_once, source_facts
from finetuner.data.documents import BAD, DUPLICATE
from finetuner.data.mixture import select_mixture
from finetuner.data.prepare import BY_WEIGHT, prepare_documents, source_names
from finetuner.data.prepared_data import PreparedData, pack_documents, require_few_dropped
from finetuner.data.raw_records import READ_BYTES
from finetuner.data.row_files import local_file
from finetuner.data.sources import load_source
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, PackingSection
from finetuner.world import World


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def rows_of(path: object, fetched: Path, **keys: Any) -> list[str]:
    """The `text` cells of an entry of plain texts."""
    source = load_source(DatasetEntry.model_validate({"path": str(path), "type": "completion"} | keys), fetched)
    rows = [placed.row for batch in source.batches(7) for placed in batch]
    assert len(rows) == len(source)
    assert not [row for row in rows if isinstance(row, DataError)]
    return [row["text"] for row in rows]


def texts(path: Path, count: int, first: int = 0) -> Path:
    return write_rows(path, [{"text": f"text {i}"} for i in range(first, first + count)])


def text(*numbers: int) -> list[str]:
    return [f"text {i}" for i in numbers]


# --- where rows lie ---


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, http.server.HTTPServer]]:
    """(address, folder behind it, server)"""
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder, server
        server.shutdown()
        thread.join()


def test_rows_come_from_a_server_and_stay_when_it_is_gone(
    served: tuple[str, Path, http.server.HTTPServer], tmp_path: Path
) -> None:
    address, folder, server = served
    fetched = tmp_path / "fetched"
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(texts(tmp_path / "a.jsonl", 3).read_bytes()))
    assert rows_of(f"{address}/rows.jsonl.gz", fetched) == text(0, 1, 2)
    assert rows_of(f"{address}/rows.jsonl.gz?token=x.y", fetched) == text(0, 1, 2)
    texts(folder / "rows.jsonl", 2)
    assert rows_of(f"{address}/rows.jsonl", fetched) == text(0, 1)
    texts(folder / "rows.jsonl", 4, first=5)
    assert rows_of(f"{address}/rows.jsonl", fetched) == text(5, 6, 7, 8), "another size: another file"
    with pytest.raises(DataError, match=r"cannot read '.*/none.jsonl': the server answers 404"):
        rows_of(f"{address}/none.jsonl", fetched)
    server.shutdown()
    server.server_close()
    assert rows_of(f"{address}/rows.jsonl", fetched) == text(5, 6, 7, 8)
    with pytest.raises(DataError, match=r"(?s)cannot read '.*/other.jsonl': .*refused.*Check the address"):
        rows_of(f"{address}/other.jsonl", fetched)


def test_a_key_in_an_address_is_not_shown(
    served: tuple[str, Path, http.server.HTTPServer], write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    address, _, _ = served
    recipe = write_recipe(datasets=[{"path": f"{address}/none.jsonl?token=geheim", "type": "alpaca"}])
    with pytest.raises(SystemExit):
        main(["preview", str(recipe)])
    Screen(enabled=True).line("from https://me:geheim@host/rows.jsonl")
    Screen(enabled=True).table([("rows", "streamed from https://me:geheim@host/rows.jsonl")])
    said = "".join(capsys.readouterr())
    assert "geheim" not in said
    assert said.count("***") == 3


def test_rows_come_through_fsspec_file_folder_or_pattern(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/rows/a.jsonl", "wb") as file:
        file.write(texts(tmp_path / "a.jsonl", 2).read_bytes())
    with fsspec.open("memory://bucket/rows/b.jsonl", "wb") as file:
        file.write(texts(tmp_path / "b.jsonl", 2, first=2).read_bytes())
    assert rows_of("memory://bucket/rows/b.jsonl", tmp_path / "f") == text(2, 3)
    assert rows_of("memory://bucket/rows/*.jsonl", tmp_path / "f") == text(0, 1, 2, 3)
    assert rows_of("memory://bucket/rows", tmp_path / "f", ds_type="json") == text(0, 1, 2, 3)
    with pytest.raises(DataError, match="cannot read 'memory://bucket/none"):
        rows_of("memory://bucket/none.jsonl", tmp_path / "f")


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.jsonl", "s3fs"), ("gs://bucket/a.jsonl", "gcsfs")])
def test_an_address_without_its_driver_names_the_package(address: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(DataError, match=f"needs a package that is not installed.\nType: pip install {package}"):
        rows_of(address, tmp_path)
    with pytest.raises(DataError, match="Protocol not known: nope"):
        rows_of("nope://bucket/a.jsonl", tmp_path)


def test_folders_have_splits_and_splits_have_slices(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    texts(folder / "train-0.jsonl", 12)
    texts(folder / "train-1.jsonl", 8, first=12)
    texts(folder / "test.jsonl", 4, first=100)
    assert rows_of(folder, tmp_path) == text(*range(20))
    assert rows_of(folder, tmp_path, split="train[:10%]") == text(0, 1)
    assert rows_of(folder, tmp_path, split="train[10:14]") == text(10, 11, 12, 13)
    assert rows_of(folder, tmp_path, split="train[-3:]+test") == text(17, 18, 19, 100, 101, 102, 103)
    assert rows_of(folder, tmp_path, data_files="train-1.jsonl", max_samples=2) == text(12, 13)
    assert rows_of(folder / "test.jsonl", tmp_path, split="train[50%:]") == text(102, 103)
    with pytest.raises(DataError, match=r"has no split 'dev'. Its splits are: train, test."):
        rows_of(folder, tmp_path, split="dev")
    with pytest.raises(DataError, match=r"has no rows in the split 'train\[30:\]'; it has 20."):
        rows_of(folder, tmp_path, split="train[30:]")


def test_a_folder_of_several_kinds_is_not_read_in_part(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    texts(folder / "a.jsonl", 3)
    (folder / "b.csv").write_text("text\ntext 3\n")
    (folder / "dataset_infos.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"holds files of several kinds, .*\n  json: a.jsonl\n  csv: b.csv\n.*data_files"
    ):
        rows_of(folder, tmp_path)
    assert rows_of(folder, tmp_path, data_files=["a.jsonl"]) == text(0, 1, 2)
    assert rows_of(folder, tmp_path, data_files=["b.csv"]) == text(3)
    (folder / "b.csv").unlink()
    assert rows_of(folder, tmp_path) == text(0, 1, 2)


def test_shards_are_every_nth_row_and_together_all_rows(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", 10)
    shards = [rows_of(path, tmp_path, shards=3, shards_idx=i) for i in range(3)]
    assert shards[1] == text(1, 4, 7)
    assert Counter(one for shard in shards for one in shard) == Counter(text(*range(10)))
    assert rows_of(path, tmp_path, shards=3, max_samples=2) == text(0, 3)
    with pytest.raises(DataError, match="no row in shard 11 of 12"):
        rows_of(path, tmp_path, shards=12, shards_idx=11)


def test_a_folder_of_save_to_disk_is_read_split_by_split(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": one} for one in text(0, 1, 2, 3)])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([3])}).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "one", tmp_path, split="train[:50%]") == text(0, 1)
    assert rows_of(tmp_path / "two", tmp_path, split="test+train[:1]", shards=1) == text(3, 0)


# --- files ---


def test_every_way_to_write_rows_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": one} for one in ("plain", "é 🦊", 'a "quote", and more', "2024-01-01T00:00:00", "")]
    lines = [json.dumps(row) for row in rows]
    ways = {
        "a.jsonl": "\n".join(lines).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + "\r\n".join(lines).encode(),
        "gaps.json": ("\n\n".join(lines) + "\n \n").encode(),
        "list.json": json.dumps(rows, indent=2, ensure_ascii=False).encode(),
        "bom-list.json": b"\xef\xbb\xbf \n[" + " ,\n".join(lines).encode() + b"]\n",
        "packed.jsonl.gz": gzip.compress("\n".join(lines).encode()),
        "a.csv": b'text\nplain\n"\xc3\xa9 \xf0\x9f\xa6\x8a"\n"a ""quote"", and more"\n2024-01-01T00:00:00\n""\n',
    }
    for name, data in ways.items():
        (tmp_path / name).write_bytes(data)
        assert rows_of(tmp_path / name, tmp_path) == [row["text"] for row in rows], name
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo")
    assert rows_of(tmp_path / "a.txt", tmp_path) == ["one", "", "two"]


def test_a_list_is_the_same_wherever_it_is_cut_into_pieces(tmp_path: Path) -> None:
    values = [
        {"text": "x" * size, "n": [size, 1.5, None, {"a": '[{"]'}]}
        for size in (1, READ_BYTES - 40, 7, 2 * READ_BYTES, 3)
    ]
    path = tmp_path / "a.json"
    for shift in range(12):
        path.write_text("[" + " " * shift + json.dumps(values)[1:])
        file = local_file(path, "json")
        assert [file.parse(record) for record in file.records()] == values


def test_rows_need_not_have_one_schema_and_a_cell_may_be_huge(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "output": "b", "meta": 1},
        {"instruction": "a", "output": "c", "meta": {"deep": [1, "two"]}, "input": None},
        {"output": "d", "instruction": "words " * 1_700_000},
        {"instruction": "a", "output": "e", "meta": "text", "input": "given"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    entry = {"path": str(path), "type": "alpaca"}
    section = DataSection.model_validate({"datasets": [entry], "max_dropped_fraction": 0.5, "sequence_len": 256})
    prepared = prepare_documents(section, tokenizer, 0)
    assert (len(prepared.train), prepared.notes) == (3, ["1 rows longer than sequence_len"])
    require_few_dropped(prepared, section)


def test_bad_rows_are_skipped_and_listed_with_their_file_and_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    good = [json.dumps(row).encode() for row in alpaca_rows(6)]
    (folder / "train-a.jsonl").write_bytes(b"\n".join([good[0], b'{"instruction": "a", "outp', b"", good[1]]))
    bad = [
        b'{"instruction": "a", "output": null}',
        b'{"output": "a"}',
        b'{"instruction": 5, "output": "a"}',
        b"\xff\xfe",
    ]
    (folder / "train-b.jsonl").write_bytes(b"\n".join([*bad, *good[2:]]))
    keys = {
        "datasets": [{"path": str(folder), "type": "alpaca"}],
        "on_bad_row": "skip",
        "dataset_prepared_path": str(tmp_path / "prepared"),
    }
    section = DataSection.model_validate(keys | {"max_dropped_fraction": 0.5})
    prepared = prepare_once(section, PackingSection(), tokenizer, 0, World())
    assert prepared.dropped_file is not None
    listed = [json.loads(line) for line in prepared.dropped_file.read_text().splitlines()]
    assert [(Path(one["source"]).name, one["row"], one["reason"]) for one in listed] == [
        ("train-a.jsonl", 1, BAD),
        *(("train-b.jsonl", i, BAD) for i in range(4)),
    ]
    assert [one["detail"] for one in listed] == [
        "line 2 is broken JSON: unterminated string starting at at character 22",
        "column 'output' holds nothing, but must be text",
        "it has no column 'instruction'; its columns are: output",
        "column 'instruction' holds int 5, but must be text. Write it as the words that are to be learned, "
        """or as it is: jq -c '.["instruction"] |= tostring' FILE > NEW""",
        "line 4 is not UTF-8 text: byte 0xff at 0",
    ]
    assert len(prepared.train) == 6
    with pytest.raises(DataError) as caught:
        prepare_once(DataSection.model_validate(keys), PackingSection(), tokenizer, 0, World())
    assert "45.5% of the 11 rows would be dropped, and max_dropped_fraction allows 20%" in str(caught.value)
    assert "5 rows that cannot become text" in str(caught.value)
    assert str(prepared.dropped_file) in str(caught.value)


_PREPARE = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from finetuner.cli import main
from finetuner.data.cache import prepare_once
from finetuner.recipe.sections import DataSection, PackingSection
from finetuner.world import World
section = DataSection.model_validate_json(Path(sys.argv[1]).read_text())
tokenizer, reported = AutoTokenizer.from_pretrained(sys.argv[2]), []
print("begin", flush=True)
prepared = prepare_once(section, PackingSection(), tokenizer, 0, World(), lambda done, total: reported.append(done))
print(prepared.train.sha256, len(prepared.train), max(reported, default=0))
"""


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_and_of_two_at_once_one_does_the_work(
    tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared_path = tmp_path / "prepared"
    entry = {"path": str(texts(tmp_path / "a.jsonl", 12_000)), "type": "completion"}
    section = DataSection.model_validate({"datasets": [entry], "dataset_prepared_path": str(prepared_path)})
    (tmp_path / "section.json").write_text(section.model_dump_json())
    command = [sys.executable, "-c", _PREPARE, str(tmp_path / "section.json"), str(tokenizer_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begin\n"
        while not list(prepared_path.glob("*.tmp/train.ids")):
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.005)
        process.kill()
    assert not list(prepared_path.glob("*/prepared.json"))
    assert list(prepared_path.glob("*.tmp"))

    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (_, one, count, rows), (_, other, other_count, other_rows) = said
    assert (one, count) == (other, other_count)
    assert int(count) == 12_000
    assert sorted([int(rows), int(other_rows)]) == [0, 12_000], "one reads the rows, the other waits for its folder"
    assert not list(prepared_path.glob("*.tmp")), "nor is anything left of the one that was killed"
    assert len(list(prepared_path.glob("*/prepared.json"))) == 1

    monkeypatch.setattr("finetuner.data.cache.prepare_documents", None)  # a further start prepares nothing
    assert prepare_once(section, PackingSection(), tokenizer, 0, World()).train.sha256 == one
    short = section.model_copy(update={"datasets": (section.datasets[0].model_copy(update={"max_samples": 50}),)})
    with pytest.raises(TypeError):
        prepare_once(short, PackingSection(), tokenizer, 0, World())


def test_a_file_that_is_written_to_while_it_is_prepared_leaves_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = texts(tmp_path / "a.jsonl", 40)
    section = DataSection.model_validate(
        {"datasets": [{"path": str(file), "type": "completion"}], "dataset_prepared_path": str(tmp_path / "prepared")}
    )

    def write_more(done: int, total: int) -> None:
        texts(file, 50)

    with pytest.raises(DataError, match="was written to while it was being prepared"):
        prepare_once(section, PackingSection(), tokenizer, 0, World(), write_more)
    assert not [
        path for path in (tmp_path / "prepared").iterdir() if path.name not in ("files", "fetched") and path.is_dir()
    ]
    assert prepare_once(section, PackingSection(), tokenizer, 0, World()).num_rows == 50


def test_a_digest_is_remembered_only_of_a_file_that_was_not_written_to_just_now(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    section = DataSection.model_validate(
        {
            "datasets": [{"path": str(tmp_path / "a.jsonl"), "type": "completion"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
        }
    )

    def remembered() -> int:
        return len([note for note in (tmp_path / "prepared/files").iterdir() if not note.suffix])

    (tmp_path / "prepared/files").mkdir(parents=True)
    for settles in (False, True):
        texts(tmp_path / "a.jsonl", 3 + settles)
        if settles:
            time.sleep(SETTLED_NS / 1e9 + 0.05)
        (facts,) = (source_facts(entry, section) for entry in section.datasets)
        assert facts == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
        assert remembered() == settles


def test_what_is_wrong_with_an_earlier_row_is_told_first(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """That it is too long is known only when it is tokenized, which is batches behind the reading."""
    rows = [json.dumps({"text": f"row {i} " * (400 if i == 700 else 1)}) for i in range(1400)]
    rows[1300] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    keys = {"datasets": [{"path": str(tmp_path / "a.jsonl"), "type": "completion"}], "sequence_len": 100}
    section = DataSection.model_validate(keys | {"excess_length_strategy": "raise"})
    with pytest.raises(DataError, match=r"row 700: \d+ tokens, but sequence_len is 100"):
        prepare_documents(section, tokenizer, 0)
    with pytest.raises(DataError, match="row 1300: line 1301 is broken JSON"):
        prepare_documents(DataSection.model_validate(keys), tokenizer, 0)


def test_the_same_documents_come_out_however_many_rows_are_taken_at_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tricky = ["<|im_end|> and <|im_start|>", "\n\nlines\n", " spaces  ", "é 😀", "", "plain words"]
    rows = [
        {"prompt": f"{i}{tricky[i % 6]}", "completion": f"{tricky[i * 7 % 5]}{i}" + " long" * i} for i in range(150)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = DataSection.model_validate(
        {"datasets": [{"path": str(tmp_path / "a.jsonl"), "type": "prompt_completion"}], "sequence_len": 120}
    )
    folders = []
    for name, (read, batch, characters) in {"one": (1, 1, 1), "some": (7, 40, 900), "all": (999, 999, 1 << 20)}.items():
        monkeypatch.setattr(preparation, "READ_ROWS", read)
        monkeypatch.setattr(preparation, "BATCH_ROWS", batch)
        monkeypatch.setattr(preparation, "BATCH_CHARACTERS", characters)
        monkeypatch.setattr(encoding, "CHARACTERS_AT_ONCE", characters)
        folder = tmp_path / name
        folder.mkdir()
        prepare_documents(section, tokenizer, 0, into=folder)
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert folders[0] == folders[1] == folders[2]
    assert len(folders[0]["dropped.jsonl"].splitlines()) > 10 and len(folders[0]["train.ids"]) > 4000


# --- mixtures ---


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    weights=st.lists(st.sampled_from([0.1, 0.25, 1.0, 2.0, 7.5]), min_size=5, max_size=5),
    by_tokens=st.booleans(),
)
def test_a_mixture_has_the_shares_of_its_weights_and_repeats_nothing(
    sizes: list[int], weights: list[float], by_tokens: bool
) -> None:
    generator = np.random.default_rng(len(sizes))
    lengths = [generator.integers(1, 50, size) for size in sizes]
    weights = weights[: len(sizes)]
    masks = select_mixture(lengths, weights, 3, by_tokens=by_tokens)
    amounts = [int(one[mask].sum()) if by_tokens else int(mask.sum()) for one, mask in zip(lengths, masks, strict=True)]
    full = [int(one.sum()) if by_tokens else len(one) for one in lengths]
    unit = min(size / weight for size, weight in zip(full, weights, strict=True))
    for amount, weight, size in zip(amounts, weights, full, strict=True):
        assert 0 < amount <= size
        assert amount == pytest.approx(unit * weight, abs=50 if by_tokens else 1), "to within a document"
    assert any(mask.all() for mask in masks) or by_tokens, "the source that is too small gives all it has"


def test_weights_choose_documents_at_preparation_and_say_so(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    entries = [
        {"path": str(texts(tmp_path / "a.jsonl", 40)), "type": "completion", "weight": 3},
        {"path": str(texts(tmp_path / "b.jsonl", 40, first=100)), "type": "completion", "weight": 1},
    ]
    (tmp_path / "into").mkdir()
    section = DataSection.model_validate({"datasets": entries, "val_set_size": 10})
    prepared = prepare_documents(section, tokenizer, 0, into=tmp_path / "into")
    a, b = prepared.shares
    assert (a.name, b.name, a.held_out + b.held_out) == ("a.jsonl", "b.jsonl", 10)
    assert a.train == 40 - a.held_out
    assert b.train == a.train // 3
    assert prepared.counts[BY_WEIGHT] == 70 - a.train - b.train
    decoded = [tokenizer.decode(prepared.train.document(i)[0][:-1]) for i in range(len(prepared.train))]
    assert len(set(decoded)) == len(decoded) == a.train + b.train
    assert [int(one.split()[1]) >= 100 for one in decoded] == [False] * a.train + [True] * b.train
    again = prepare_documents(section, tokenizer, 0)
    assert again.train.sha256 == prepared.train.sha256
    assert prepare_documents(section, tokenizer, 1).train.sha256 != prepared.train.sha256


@pytest.mark.parametrize("size", [0.2, 5])
def test_equal_rows_are_learned_once_and_never_when_held_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, size: float
) -> None:
    rows = [{"text": f"text {i % 20}", "id": i} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    base = {"datasets": [{"path": str(path), "type": "completion"}], "dataset_exact_deduplication": True}

    def documents(prepared: PreparedData) -> tuple[list[bytes], list[bytes]]:
        train, held = prepared.train, prepared.held_out
        return [train.document(i)[0].tobytes() for i in range(len(train))], [
            held.document(i)[0].tobytes() for i in range(len(held))
        ]

    train, held = documents(
        split := prepare_documents(DataSection.model_validate(base | {"val_set_size": size}), tokenizer, 0)
    )
    assert split.counts == {DUPLICATE: 40}
    assert held
    assert len(set(train + held)) == len(train + held) == 20
    test = [{"path": str(texts(tmp_path / "test.jsonl", 5)), "type": "completion"}]
    train, held = documents(prepare_documents(DataSection.model_validate(base | {"test_datasets": test}), tokenizer, 0))
    assert (len(train), len(held)) == (15, 5), "the test rows stay, and their equals are not learned"
    assert not set(train) & set(held)


def test_held_out_rows_are_known_by_their_source_packed_or_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "same"
    folder.mkdir()
    paths = [texts(tmp_path / "rows.jsonl", 9), texts(folder / "rows.jsonl", 4, first=50)]
    entries = [{"path": str(path), "type": "completion"} for path in paths]
    section = DataSection.model_validate({"datasets": entries[:1], "test_datasets": entries, "sequence_len": 16})
    prepared = prepare_documents(section, tokenizer, 0)
    assert [tuple(part) for part in prepared.held_out_ranges] == [("rows.jsonl", 0, 9), ("rows.jsonl train", 9, 13)]
    packs = pack_documents(prepared, 16, train=False, held_out=True)
    first, second = packs.held_out_ranges
    assert (first.start, first.stop, second.stop) == (0, second.start, len(packs.held_out_rows))
    for part, documents in ((first, range(9)), (second, range(9, 13))):
        inside = [ids.tobytes() for i in range(part.start, part.stop) for ids, _ in packs.held_out_rows.documents(i)]
        assert Counter(inside) == Counter(prepared.held_out.document(i)[0].tobytes() for i in documents)
    assert source_names([*section.test_datasets, *section.test_datasets]) == [
        "rows.jsonl", "rows.jsonl train", "rows.jsonl #2", "rows.jsonl #3",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_held_out_loss_is_said_by_source_too(
    write_recipe: Callable[..., Path],
    train: Callable[..., list[dict]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = alpaca_rows(10)
    test = [
        {"path": str(write_rows(tmp_path / name, part)), "type": "alpaca"}
        for name, part in (("a.jsonl", rows[:3]), ("b.jsonl", rows[3:]))
    ]
    recipe = write_recipe(max_steps=2, micro_batch_size=4, test_datasets=test, eval_batch_size=2)
    metrics = train(recipe)
    (both,) = [row for row in metrics if "eval_loss" in row]
    of_all = {"step", "eval_loss", "eval_perplexity", "eval_bits_per_byte"}
    assert set(both) == of_all | {"eval_loss/a.jsonl", "eval_loss/b.jsonl"}
    printed = capsys.readouterr().out
    assert f"(a.jsonl {both['eval_loss/a.jsonl']:.4f}, b.jsonl {both['eval_loss/b.jsonl']:.4f})" in printed
    for i, name in enumerate(("a.jsonl", "b.jsonl")):
        alone = train(recipe, f"output_dir={tmp_path / name}.out", f"test_datasets={json.dumps(test[i : i + 1])}")
        (row,) = [row for row in alone if "eval_loss" in row]
        assert set(row) == of_all
        assert row["eval_loss"] == pytest.approx(both[f"eval_loss/{name}"], rel=1e-6)
