"""A stream reads from wherever rows lie, goes on where a connection broke, and never goes on with other rows."""

import gzip
import http.server
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from support.batches import make_plan
from support.results import largest_difference, weights_of
from support.rows import RecipeWriter, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.batches import BatchLayout
from finetuner.data.documents import BAD, TOO_LONG, Outcome
from finetuner.data.dropped_rows import DroppedRowsFile
from finetuner.data.remote_files import DEFAULT_RETRY, ReconnectingFile, RetryPolicy, open_http_at
from finetuner.data.row_stream import RowStream
from finetuner.data.streaming_source import START, StreamingSource
from finetuner.data.train_loader import StreamLoader, build_train_loader
from finetuner.errors import CheckpointError, DataError, LostConnectionError
from finetuner.recipe.sections import DataSection, DatasetEntry


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def texts(path: Path, count: int, first: int = 0) -> Path:
    return write_rows(path, [{"text": f"text {i}"} for i in range(first, first + count)])


def streamed(path: object, folder: Path, count: int, place: list[int] | None = None, **keys: Any) -> list[int]:
    """The numbers of the next texts of a stream of an entry, from a place on."""
    entry = DatasetEntry.model_validate({"path": str(path), "type": "completion"} | keys)
    rows = StreamingSource(entry, START if place is None else place, folder, keys.get("retry", DEFAULT_RETRY))
    numbers: list[int] = []
    while len(numbers) < count:
        for placed, _ in rows.take(3):
            assert not isinstance(placed.row, DataError)
            numbers.append(int(placed.row["text"].split()[1]))
    return numbers[:count]


# --- a server that breaks ---


@dataclass
class Fate:
    """What happens to the next requests: the bytes that are sent of each before the connection is cut."""

    cuts: list[int | None] = field(default_factory=list)
    ranges: bool = True
    etag: str = '"1"'
    asked: list[str | None] = field(default_factory=list)


class Cutter(http.server.BaseHTTPRequestHandler):
    data: bytes
    fate: Fate

    def do_GET(self) -> None:
        asked, fate = self.headers["Range"], self.fate
        fate.asked.append(asked)
        cut = fate.cuts.pop(0) if fate.cuts else None
        if cut == -1:
            self.send_error(503)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fate.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(len(self.data) - start))
        self.send_header("ETag", fate.etag)
        self.end_headers()
        self.wfile.write(self.data[start : None if cut is None else start + cut])

    def log_message(self, *arguments: object) -> None:
        pass


Serve = Callable[[bytes], tuple[str, Fate]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(bytes) -> (address without a name's end, the fate of its requests)"""
    servers = []

    def start(data: bytes) -> tuple[str, Fate]:
        fate = Fate()
        handler = type("One", (Cutter,), {"data": data, "fate": fate})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}", fate

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_reading_goes_on_where_a_connection_broke_and_says_so(serve: Serve, ranges: bool) -> None:
    data = os.urandom(300_000)
    address, fate = serve(data)
    fate.cuts, fate.ranges = [100_000, -1, 150_000 if ranges else 170_000, 0, None], ranges
    said: list[str] = []
    name = f"{address}/rows.jsonl"
    with ReconnectingFile(name, partial(open_http_at, name), RetryPolicy(said.append, (0.0, 0.01))) as file:
        read = b"".join(iter(lambda: file.read(7_000), b""))
    assert read == data
    assert [one.rpartition(" (")[0] for one in said] == [f"note: the connection to {name} broke"] * 4
    assert "it ended 200,000 bytes too early); trying again in 0 s" in said[0]
    assert "503" in said[1]
    assert said[1].endswith("trying again in 0.01 s"), "waits grow until bytes come again"
    assert fate.asked[:3] == [None, "bytes=100000-", "bytes=100000-"]


def test_a_server_that_stays_away_ends_the_run_with_what_to_type(serve: Serve) -> None:
    address, fate = serve(os.urandom(1_000))
    fate.cuts = [100, 0, 0]
    name = f"{address}/rows.jsonl"
    with ReconnectingFile(name, partial(open_http_at, name), RetryPolicy(wait_seconds=(0.0, 0.0))) as file:
        assert len(file.read(100)) == 100
        with pytest.raises(LostConnectionError, match=r"(?s)it ended 900 bytes.*3 times.*resume_from_checkpoint=true"):
            file.read(100)
    assert LostConnectionError.exit_code == 75


def test_a_file_that_another_one_replaces_is_not_read_on(serve: Serve) -> None:
    address, fate = serve(os.urandom(1_000))
    fate.cuts = [100]
    name = f"{address}/rows.jsonl"
    with ReconnectingFile(name, partial(open_http_at, name), RetryPolicy(wait_seconds=(0.0,))) as file:
        file.read(100)
        fate.etag = '"2"'
        with pytest.raises(DataError, match="replaced by another file while it was read"):
            file.read(100)


def test_what_waiting_does_not_mend_is_said_at_once(serve: Serve, tmp_path: Path) -> None:
    address, fate = serve(b"")
    said: list[str] = []
    with pytest.raises(DataError, match=r"cannot read the dataset 'memory://nowhere/a\.jsonl'"):
        streamed("memory://nowhere/a.jsonl", tmp_path, 1)
    entry = DatasetEntry(path=f"{address}/a.jsonl", type="completion")
    fate.cuts = [-1] * 9
    with pytest.raises(LostConnectionError, match="HTTP Error 503"):
        StreamingSource(entry, START, tmp_path, RetryPolicy(said.append, (0.0,)))
    assert len(said) == 1
    with pytest.raises(DataError, match=r"a.jsonl: it has no rows"):
        fate.cuts = []
        StreamingSource(entry, START, tmp_path, DEFAULT_RETRY).take(1)


# --- from everywhere ---


def test_a_stream_from_a_server_is_whole_packed_or_not_however_it_breaks(serve: Serve, tmp_path: Path) -> None:
    data = texts(tmp_path / "a.jsonl", 5_000).read_bytes()
    said: list[str] = []
    for name, body in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data))):
        address, fate = serve(body)
        fate.cuts = [None, len(body) // 3, len(body) // 3]  # the first one asks for size and date only
        entry = DatasetEntry(path=f"{address}/{name}", type="completion")
        rows = StreamingSource(entry, START, tmp_path, RetryPolicy(said.append, (0.0,)))
        numbers: list[int] = []
        while len(numbers) < 5_001:
            numbers += [int(placed.row["text"].split()[1]) for placed, _ in rows.take(64)]  # type: ignore[index]
        assert numbers[:5_000] == list(range(5_000))
        assert rows.position[0] == 1, "and from the start again"
        assert rows.files.versions == [[f"{address}/{name}", len(body), '"1"']]
    assert len(said) == 4


def places(tmp_path: Path) -> dict[str, tuple[object, dict[str, Any]]]:
    """Ten texts in every place and kind that a stream can read."""
    plain = texts(tmp_path / "a.jsonl", 10)
    table = datasets.Dataset.from_list([{"text": f"text {i}"} for i in range(10)])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([3])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(list(table)).encode()))
    folder, halves = tmp_path / "folder", tmp_path / "halves"
    folder.mkdir()
    halves.mkdir()
    for name, first, count in (("train-0.jsonl", 0, 4), ("train-1.jsonl", 4, 6), ("test.jsonl", 50, 2)):
        texts(folder / name, count, first)
    table.select(range(5)).to_parquet(halves / "train-0.parquet")
    table.select(range(5, 10)).to_parquet(halves / "train-1.parquet")
    for name in ("a.parquet", "a.jsonl"):
        with fsspec.open(f"memory://bucket/{name}", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    for name in ("train-0.jsonl", "train-1.jsonl"):
        with fsspec.open(f"memory://bucket/folder/{name}", "wb") as file:
            file.write((folder / name).read_bytes())
    return {
        "jsonl": (plain, {}),
        "gzip": (tmp_path / "a.json.gz", {}),
        "parquet": (tmp_path / "a.parquet", {}),
        "folder": (folder, {}),
        "files of a folder": (folder, {"data_files": ["train-0.jsonl", "train-1.jsonl"]}),
        "parquet folder": (halves, {}),
        "kind that is said": (halves, {"ds_type": "parquet"}),
        "save_to_disk": (tmp_path / "saved", {}),
        "save_to_disk, splits": (tmp_path / "splits", {}),
        "address": ("memory://bucket/a.jsonl", {}),
        "pattern": ("memory://bucket/folder/*.jsonl", {}),
        "bucket's folder": ("memory://bucket/folder", {"ds_type": "json"}),
        "parquet at an address": ("memory://bucket/a.parquet", {}),
    }


def test_a_stream_has_the_same_rows_from_every_place_and_goes_on_from_any(tmp_path: Path) -> None:
    expected = [*range(10), *range(10), *range(5)]
    for name, (path, keys) in places(tmp_path).items():
        assert streamed(path, tmp_path, 25, **keys) == expected, name
        entry = DatasetEntry.model_validate({"path": str(path), "type": "completion"} | keys)
        behind: list[list[int]] = []
        rows = StreamingSource(entry, START, tmp_path, DEFAULT_RETRY)
        while len(behind) < 14:
            behind += [place for _, place in rows.take(3)]
        for count in (1, 4, 7, 10, 13):
            assert streamed(path, tmp_path, 25 - count, behind[count - 1], **keys) == expected[count:], name


def test_a_hub_dataset_is_streamed_from_the_cache_of_an_earlier_load(hf_cache: Path, tmp_path: Path) -> None:
    builder = datasets.load_dataset_builder(
        "json", data_files={"train": str(texts(tmp_path / "a.jsonl", 10))}, cache_dir=str(tmp_path / "cache")
    )
    builder.download_and_prepare()
    place = hf_cache / "someone___numbers" / "default" / "0.0.0" / "abcdef"
    place.mkdir(parents=True)
    for file in Path(builder.cache_dir).iterdir():
        (place / file.name.replace("json-", "numbers-")).write_bytes(file.read_bytes())
    assert streamed("someone/numbers", tmp_path, 13) == [*range(10), 0, 1, 2]
    assert streamed("someone/numbers", tmp_path, 3, [0, 0, 8]) == [8, 9, 0]
    with pytest.raises(DataError, match=r"(?s)cannot read the dataset 'someone/other'.*Check the name.* network"):
        streamed("someone/other", tmp_path, 1)


# --- what is lost, and what has changed ---


def test_rows_that_are_not_learned_are_listed_once_and_counted_always(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": f"text {i}"} if i % 7 else {"text": i} for i in range(40)]
    path, listed = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "dropped.jsonl"
    values = {
        "datasets": [{"path": str(path), "type": "completion"}], "streaming": True, "on_bad_row": "skip",
        "sequence_len": 16, "streaming_multipack_buffer_size": 9,
    }  # fmt: skip
    section = DataSection.model_validate(values)

    def open_stream(listed: Path, state: Any = None) -> RowStream:
        return RowStream(section, tokenizer, 0, packing=False, state=state, dropped_file=listed)

    unbroken = open_stream(listed)
    for i in range(30):
        unbroken.rows(i, 1)
    whole = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(one["row"], one["reason"]) for one in whole] == [(i, BAD) for i in range(0, 40, 7)]
    assert {one["source"] for one in whole} == {str(path)}
    assert whole[1]["detail"].startswith("column 'text' holds int 7, but must be text. ")
    assert unbroken.next.counts[BAD] > len(whole), "a second pass loses them again"
    assert unbroken.notes == [f"{unbroken.next.counts[BAD]} rows {BAD}"]
    assert unbroken.num_read == unbroken.next.counts["read"]

    broken = open_stream(tmp_path / "other.jsonl")
    for i in range(8):
        broken.rows(i, 1)
    state = broken.state_at(5)
    resumed = open_stream(tmp_path / "other.jsonl", state)
    for i in range(5, 30):
        resumed.rows(i, 1)
    assert (tmp_path / "other.jsonl").read_text() == listed.read_text()
    assert (resumed.next, resumed.notes) == (unbroken.next, unbroken.notes)


def test_a_listing_is_bounded_for_each_reason_and_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "dropped.jsonl"
    listing = DroppedRowsFile(path, 0, max_listed=3)
    for block in range(4):
        listing.add([Outcome("a", 2 * block + i, BAD, 0) for i in range(2)], block)
        listing.add([Outcome("a", block, TOO_LONG, 9)], block)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 0, 2, 1, 2]
    with path.open("a") as file:
        file.write('{"source": "a", "ro')
    again = DroppedRowsFile(path, 1, max_listed=3)
    assert again.num_listed == {BAD: 2, TOO_LONG: 1}
    again.add([Outcome("a", 2, BAD, 0), Outcome("a", 3, BAD, 0)], 1)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 0, 2]


def test_a_stream_that_loses_too_much_stops_before_it_has_read_everything(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": 5}] * 25_000)
    values = {"datasets": [{"path": str(path), "type": "completion"}], "streaming": True, "on_bad_row": "skip"}
    stream = RowStream(
        DataSection.model_validate(values), tokenizer, 0, packing=False, dropped_file=tmp_path / "dropped.jsonl"
    )
    with pytest.raises(DataError, match=r"100.0% of the 10,000 rows.*\nThey are listed in .*dropped.jsonl"):
        stream.rows(0, 1)
    assert len((tmp_path / "dropped.jsonl").read_text().splitlines()) == 10_000


def changed(path: Path) -> None:
    path.write_text(path.read_text().replace("text 1", "text 7"))


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 5))


def longer(path: Path) -> None:
    path.write_text(path.read_text() + '{"text": "more"}\n')


def another(path: Path) -> None:
    texts(path.with_name("train-2.jsonl"), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed, r"'train-0.jsonl' of '.*' has changed since the checkpoint \(20..-.*Z -> 20..-.*Z\)(?s:.*)touch -d"),
        (touched, r"If only its time is another, as a copy's is: touch -d '20.*Z' train-0.jsonl"),
        (longer, r"has changed since the checkpoint \(57 -> 74 bytes\)"),
        (another, r"not those of the checkpoint \(new: train-2.jsonl\)(?s:.*)another output_dir"),
    ],
)
def test_a_corpus_that_changed_since_the_checkpoint_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder, checkpoint = tmp_path / "folder", tmp_path / "checkpoint"
    folder.mkdir()
    checkpoint.mkdir()
    path = texts(folder / "train-0.jsonl", 3)
    texts(folder / "train-1.jsonl", 3)
    section = DataSection.model_validate(
        {
            "datasets": [{"path": str(folder), "type": "completion"}],
            "streaming": True,
            "sequence_len": 16,
            "streaming_multipack_buffer_size": 9,
        }
    )
    plan: Any = make_plan(1, 2)

    def feed(checkpoint: Path | None) -> Any:
        return build_train_loader(section, tokenizer, None, plan, None, BatchLayout(), checkpoint)  # type: ignore[arg-type]

    first = feed(None)
    assert isinstance(first, StreamLoader)
    first.batches(0)
    first.write_position(1, checkpoint)
    assert feed(checkpoint).stream.next == first.stream.state_at(2)
    first.close()
    change(path)
    with pytest.raises(CheckpointError, match=message):
        feed(checkpoint)


@pytest.mark.slow
def test_a_run_whose_server_goes_away_says_how_to_go_on_and_goes_on_as_if_nothing_had_been(
    serve: Serve,
    write_recipe: RecipeWriter,
    train: Callable[..., list[dict]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"text": f"text {i} " + "word " * (i % 9)} if i % 10 else {"text": None} for i in range(24)]
    address, fate = serve(write_rows(tmp_path / "a.jsonl", rows).read_bytes())
    recipe = write_recipe(
        datasets=[{"path": f"{address}/a.jsonl", "type": "completion"}], streaming=True, on_bad_row="skip",
        streaming_multipack_buffer_size=6, sequence_len=16, max_steps=12, save_steps=1, micro_batch_size=4,
    )  # fmt: skip
    monkeypatch.setattr("finetuner.data.train_loader.RetryPolicy", partial(RetryPolicy, wait_seconds=(0.0, 0.0)))
    unbroken = train(recipe)
    said = capsys.readouterr().out
    assert re.search(r"of \d+ rows read, dropped, cut or split \(the first of each are in .*dropped.jsonl\):", said)
    assert re.search(r"\n  \d+ rows that cannot become text\n", said)
    listed = (tmp_path / "out" / "dropped.jsonl").read_text()
    assert [json.loads(line)["row"] for line in listed.splitlines()] == [0, 10, 20]

    out = f"output_dir={tmp_path / 'other'}"
    fate.cuts = [None, 0, None, -1, -1, -1]  # size and date; a break that is mended; one pass; and no more
    with pytest.raises(LostConnectionError, match="503"):
        train(recipe, out)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"note: the connection to {address}/a.jsonl broke (it ended" in said
    assert said.count("trying again in 0 s") == 3
    assert f"resume with: accelerate launch -m finetuner.train {recipe} resume_from_checkpoint=true" in said
    resumed = train(recipe, out, "resume_from_checkpoint=true")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in unbroken]
    assert (tmp_path / "other" / "dropped.jsonl").read_text() == listed
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(tmp_path / "other")) == 0
