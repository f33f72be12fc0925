"""Packed files are read or named for what they are, by their bytes and not their names; no byte behind them is lost."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest

from finetuner.data.row_files import local_file
from finetuner.data.sources import load_source
from finetuner.data.streaming_source import DEFAULT_RETRY, START, StreamingSource
from finetuner.errors import DataError
from finetuner.recipe import load_recipe
from finetuner.recipe.rules import looks_local
from finetuner.recipe.sections import DatasetEntry

ROWS = [{"text": f"text {i} é"} for i in range(40)]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def arrow_packed(codec: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return pack


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": arrow_packed("zstd"),
    ".lz4": arrow_packed("lz4"),
}


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def entry_of(path: object, **keys: Any) -> DatasetEntry:
    return DatasetEntry.model_validate({"path": str(path), "type": "completion"} | keys)


def rows_of(path: object, **keys: Any) -> list[Any]:
    """The rows of a file, loaded and streamed."""
    entry, folder = entry_of(path, **keys), Path("unused")
    source = load_source(entry, folder)
    rows = [placed.row for batch in source.batches(7) for placed in batch]
    stream = StreamingSource(entry, START, folder, DEFAULT_RETRY)
    streamed: list[Any] = []
    while len(streamed) < len(rows):
        streamed += [placed.row for placed, _ in stream.take(16)]
    assert streamed[: len(rows)] == rows
    assert len(source) == len(rows)
    return rows


def error_of(path: object, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, **keys)
    assert "on_bad_row" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_packed_file_is_read_whatever_its_name_says(tmp_path: Path, suffix: str) -> None:
    packed = PACKINGS[suffix](PLAIN)
    for name, keys in ((f"rows.jsonl{suffix}", {}), ("rows.jsonl", {}), ("rows", {"ds_type": "json"})):
        (tmp_path / name).write_bytes(packed)
        assert rows_of(tmp_path / name, **keys) == ROWS
    assert looks_local(f"rows.jsonl{suffix}")
    (tmp_path / f"list.json{suffix}").write_bytes(PACKINGS[suffix](json.dumps(ROWS).encode()))
    assert rows_of(tmp_path / f"list.json{suffix}") == ROWS
    (tmp_path / f"rows.txt{suffix}").write_bytes(PACKINGS[suffix](b"one\ntwo"))
    assert rows_of(tmp_path / f"rows.txt{suffix}") == [{"text": "one"}, {"text": "two"}]
    assert rows_of(tmp_path / f"rows.txt{suffix}", sample_by="document") == [{"text": "one\ntwo"}]


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_packed_file_at_an_address_is_read_too(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fsspec.open(f"memory://packed/rows.jsonl{suffix}", "wb") as file:
        file.write(PACKINGS[suffix](PLAIN))
    assert rows_of(f"memory://packed/rows.jsonl{suffix}") == ROWS


@pytest.mark.parametrize("suffix", PACKINGS)
def test_packed_files_one_behind_the_other_are_all_read(tmp_path: Path, suffix: str) -> None:
    pack = PACKINGS[suffix]
    path = tmp_path / f"rows.jsonl{suffix}"
    half = PLAIN.index(b"\n", len(PLAIN) // 2) + 1
    path.write_bytes(pack(PLAIN[:half]) + pack(PLAIN[half:]))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_packed_file_that_is_cut_off_or_goes_on_with_other_bytes_is_refused(tmp_path: Path, suffix: str) -> None:
    packed = PACKINGS[suffix](PLAIN)
    path = tmp_path / f"rows.jsonl{suffix}"
    for data in (packed[: len(packed) // 2], packed[:-3], packed + PLAIN, packed + b"\x01garbage, of some length"):
        path.write_bytes(data)
        message = error_of(path)
        assert "it is packed, and cut off or damaged" in message and str(path) in message


def test_a_zip_archive_is_the_rows_of_its_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zip"
    path.write_bytes(zipped({"rows.jsonl": PLAIN}))
    assert rows_of(path) == ROWS
    path = tmp_path / "several.zip"
    halves = PLAIN.splitlines(keepends=True)
    members = {"b/2.jsonl": b"".join(halves[20:]), "a/1.jsonl": b"".join(halves[:20]), "__MACOSX/._x.jsonl": b"\0\5"}
    path.write_bytes(zipped(members))
    assert rows_of(path) == ROWS
    path.write_bytes(zipped({"rows.csv": b"text\none\n"}))
    assert rows_of(path) == [{"text": "one"}]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.zip").write_bytes(zipped({"rows.jsonl": PLAIN}))
    assert rows_of(folder) == ROWS


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.jsonl": PLAIN, "b.csv": b"text\na\n"}, "several kinds of files: a.jsonl, b.csv"),
        ({"xl/workbook.xml": b"<x/>"}, "Excel or Word file.\nSave it as CSV"),
        ({}, "without a file in it"),
    ],
)
def test_a_zip_archive_of_something_else_is_named(tmp_path: Path, members: dict[str, bytes], expected: str) -> None:
    path = tmp_path / "rows.zip"
    path.write_bytes(zipped(members) if members else zipped({"__MACOSX/._a": b""}))
    assert expected in error_of(path)
    damaged = zipped({"rows.jsonl": PLAIN * 20})
    (tmp_path / "cut.jsonl.zip").write_bytes(damaged[:-30])
    assert "cut off or damaged" in error_of(tmp_path / "cut.jsonl.zip")


@pytest.mark.parametrize(
    ("name", "data", "keys", "expected"),
    [
        ("rows.jsonl.7z", b"7z\xbc\xaf\x27\x1c" + b"\0" * 40, {}, "packed with 7-Zip.\nUnpack it: 7z x FILE"),
        ("rows.rar", b"Rar!\x1a\x07\x01\0" * 9, {"ds_type": "json"}, "Unpack it: unrar x "),
        ("rows.jsonl.tar.gz", None, {}, "tar archive.\nUnpack it: tar xf FILE"),
        ("rows.tar", None, {"ds_type": "json"}, "Unpack it: tar xf /"),
        ("rows.json", b"PAR1" + b"\0" * 50, {}, "Parquet file.\nWrite `ds_type: parquet`"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", {}, "git lfs pull"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", {}, "git lfs pull"),
        ("rows.parquet", b"<!DOCTYPE html><html></html>", {}, "HTML page"),
        ("rows.jsonl", b"\x80\x04\x95\x10\0\0\0", {}, "it is a pickle"),
        ("rows.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 4, {}, "Save it as CSV"),
        ("rows.jsonl", "\ufeff".encode("utf-16-le") + '{"text": "a"}\r\n'.encode("utf-16-le"), {}, "UTF-16"),
        ("rows.jsonl", '{"text": "ab"}\n'.encode("utf-16-le"), {}, "iconv -f UTF-16LE -t UTF-8"),
        ("rows.json", '[{"text": "ab"}]'.encode("utf-16-be"), {}, "UTF-16BE"),
        ("rows.csv", "text\nабв\n".encode("utf-16"), {}, "UTF-16"),
        ("rows.txt", "some words, and more\n".encode("utf-32"), {}, "UTF-32"),
        ("rows.txt", "some words, and more\n".encode("utf-32-be"), {}, "UTF-32BE"),
        ("rows.txt", "words of old".encode("utf-16-le"), {"sample_by": "document"}, "UTF-16LE"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_turns_it_into_rows(
    tmp_path: Path, name: str, data: bytes | None, keys: dict[str, str], expected: str
) -> None:
    tar = b"rows.jsonl".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 248
    path = tmp_path / name
    path.write_bytes(data if data is not None else gzip.compress(tar) if name.endswith(".gz") else tar)
    assert expected in error_of(path, **keys)


def test_html_and_zero_bytes_are_texts_to_learn_from_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "pages.txt"
    path.write_text("<!doctype html>\n<p>a</p>\n")
    assert rows_of(path) == [{"text": "<!doctype html>"}, {"text": "<p>a</p>"}]
    path.write_bytes(b"one\0two\nthree")
    assert rows_of(path)[1] == {"text": "three"}


def test_text_in_a_windows_encoding_gets_a_command_and_not_the_advice_to_lose_its_rows(tmp_path: Path) -> None:
    rows = [{"text": "plain"}, {"text": "Café, “so”"}, {"text": "more"}]
    for name, data in (
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("rows.csv", 'text\n"plain"\n"Café, “so”"\n'),
        ("rows.txt", "plain\nCafé, “so”\n"),
    ):
        path = tmp_path / name
        path.write_bytes(data.encode("cp1252"))
        _, error, *_ = [placed.row for batch in load_source(entry_of(path), tmp_path).batches(9) for placed in batch]
        assert isinstance(error, DataError)
        assert "is not UTF-8 text: byte 0xe9" in str(error)
        assert "Café, “so”" in str(error)
        assert "iconv -f CP1252 -t UTF-8" in str(error)


def test_text_lines_of_old_macs_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"one\rtwo\r\rthree")
    assert rows_of(path) == [{"text": one} for one in ("one", "two", "", "three")]
    path.write_bytes(b"loading 1%\rloading 2%\nnext")
    assert rows_of(path) == [{"text": "loading 1%\rloading 2%"}, {"text": "next"}], "as in a log of a terminal"


def test_reading_a_packed_file_in_part_leaves_nothing_open(tmp_path: Path) -> None:
    """Unclosed files are warnings, and warnings are errors in this suite."""
    for suffix, pack in PACKINGS.items():
        path = tmp_path / f"rows.jsonl{suffix}"
        path.write_bytes(pack(PLAIN))
        records = local_file(path, "json").records()
        next(records)
        records.close()


def test_a_recipe_takes_packed_names_and_says_which_names_there_are(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    (tmp_path / "rows.txt.zst").write_bytes(PACKINGS[".zst"](b"one\ntwo\n"))
    keys = {"path": str(tmp_path / "rows.txt.zst"), "type": "completion", "sample_by": "document"}
    load_recipe(write_recipe(datasets=[keys]))
    (tmp_path / "rows.xml").write_text("<a/>")
    message = error_of(tmp_path / "rows.xml")
    assert ".tsv, .ndjson; if it is text, with .gz, .bz2, .xz, .zst, .lz4, .zip behind it" in message
