"""A stream of rows: nothing left out, nothing twice, the same rows from any place on, and a run that can be resumed."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import all_ranks, make_plan
from support.processes import run_command
from support.results import largest_difference, weights_of
from support.rows import alpaca_rows, texts, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.batches import BatchLayout
from finetuner.data.row_stream import RowStream, StreamState, cut_into_rows
from finetuner.data.train_loader import Prefetcher, StreamLoader, prefetching
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


Opener = Callable[..., RowStream]


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerBase) -> Opener:
    def of(
        entries: list[dict[str, Any]],
        *,
        packing: bool = False,
        state: StreamState | None = None,
        ahead: bool = False,
        **keys: Any,
    ) -> RowStream:
        values = {"datasets": entries, "sequence_len": 32, "streaming": True, "streaming_multipack_buffer_size": 9}
        section = DataSection.model_validate(values | keys)
        return RowStream(section, tokenizer, 5, packing=packing, state=state, ahead=ahead)

    return of


@settings(deadline=None, max_examples=100, derandomize=True)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), length=st.integers(2, 20))
def test_cutting_leaves_no_token_out_and_repeats_none(lengths: list[int], length: int) -> None:
    borders = np.cumsum([0, *lengths])
    ids = np.arange(borders[-1], dtype=np.int32)
    documents = [(ids[a:b], -ids[a:b]) for a, b in pairwise(borders)]
    rows, rest = cut_into_rows(documents, length)
    assert [sum(len(part) for part, _ in row) for row in rows] == [length] * len(rows)
    assert sum(len(part) for part, _ in rest) < length
    joined = [part for row in [*rows, rest] for part in row]
    assert np.concatenate([part for part, _ in joined] or [ids]).tolist() == ids.tolist()
    assert all((part == -labels).all() for part, labels in joined)
    starts = {int(part[0]) for part, _ in joined}
    assert starts <= {int(b) for b in borders} | set(range(0, int(borders[-1]), length)), "cut at rows' ends only"


def test_joined_texts_are_full_rows_of_every_token_once_a_pass(
    opened: Opener, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    entry = texts(tmp_path, "a", 40)
    stream = opened([entry])
    rows = [stream.rows(i, 1) for i in range(60)]
    assert {row.length(0) for row in rows} == {32}
    assert {len(row.documents(0)) for row in rows} == {1}, "documents see each other"
    text = tokenizer.decode(np.concatenate([row.documents(0)[0][0] for row in rows]))
    words = Counter(part.split(" ")[0] for part in text.split("<|endoftext|>"))
    whole = json.loads(Path(entry["path"]).read_text().splitlines()[20])["text"]
    assert whole + "<|endoftext|>" in text
    first_pass = list(words)[:40]
    assert sorted(first_pass) == sorted(f"a{i}" for i in range(40)), "each once before any comes again"
    assert first_pass != [f"a{i}" for i in range(40)], "shuffled"
    apart = opened([entry], packing=True)
    split = [apart.rows(i, 1) for i in range(60)]
    assert max(len(row.documents(0)) for row in split) > 1
    for one, other in zip(rows, split, strict=True):
        assert one.documents(0)[0][0].tolist() == [i for ids, _ in other.documents(0) for i in ids.tolist()]


@pytest.mark.parametrize("kind", ["joined", "apart", "packed", "alone"])
def test_a_stream_goes_on_from_any_row_as_if_it_had_never_stopped(opened: Opener, tmp_path: Path, kind: str) -> None:
    if kind in ("joined", "apart"):
        entries = [texts(tmp_path, "a", 30) | {"weight": 2}, texts(tmp_path, "b", 7) | {"weight": 1}]
    else:
        path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(25))
        entries = [{"path": str(path), "type": "alpaca"}]
    keys: dict[str, Any] = {"packing": kind in ("apart", "packed"), "sequence_len": 256}
    if len(entries) == 2:
        keys |= {"mix_by": "tokens", "sequence_len": 16}
    unbroken = opened(entries, **keys)
    shas = [unbroken.rows(2 * step, 2).sha256 for step in range(30)]
    assert len(set(shas)) > 20
    for step in (0, 1, 7, 20):
        stream = opened(entries, **keys)
        for i in range(step):
            stream.rows(2 * i, 2)
        stream.rows(2 * step, 4)  # made ahead
        state = StreamState(**json.loads(json.dumps(asdict(stream.state_at(2 * step)))))
        resumed = opened(entries, state=state, **keys)
        assert [resumed.rows(2 * i, 2).sha256 for i in range(step, 30)] == shas[step:]
    assert [opened(entries, **keys).rows(0, 2).sha256] == shas[:1]


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_sources_keep_to_their_weights_all_along(
    opened: Opener, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, by: str
) -> None:
    entries = [texts(tmp_path, "a", 50) | {"weight": 3}, texts(tmp_path, "b", 9) | {"weight": 1}]
    stream = opened(entries, mix_by=by, packing=False)
    for count in (20, 60, 120):
        stream.rows(count, 1)
        a, b = stream.next.taken
        assert a / b == pytest.approx(3, rel=0.15)
    text = tokenizer.decode(np.concatenate([stream.rows(i, 1).documents(0)[0][0] for i in range(117, 121)]))
    assert "a" in text


def test_ranks_share_the_rows_of_a_step_and_their_number_changes_nothing(opened: Opener, tmp_path: Path) -> None:
    entry = texts(tmp_path, "a", 30)
    seen = []
    for ranks, micro, accum in ((1, 4, 1), (2, 1, 2), (4, 1, 1)):
        plan = make_plan(ranks, micro, accum)
        feeds = [StreamLoader(opened([entry]), mine, BatchLayout(pad_to=32)) for mine in all_ranks(plan)]
        steps = []
        for step in range(6):
            rows = [row.numpy().tobytes() for feed in feeds for batch in feed.batches(step) for row in batch.input_ids]
            assert len(rows) == 4
            steps.append(sorted(rows))
        seen.append(steps)
    assert seen[0] == seen[1] == seen[2]


def test_a_stream_says_what_it_cannot_use(opened: Opener, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": 5}\n{"text": "two"}\n')
    entry = {"path": str(path), "type": "completion"}
    with pytest.raises(DataError, match=r"a.jsonl: row 1: column 'text' holds int 5"):
        opened([entry]).rows(0, 1)
    stream = opened([entry], on_bad_row="skip", max_dropped_fraction=0.5)
    stream.rows(0, 1)
    assert any("that cannot become text" in note for note in stream.notes)
    with pytest.raises(DataError, match=r"30.8% of the 13 rows read so far are dropped, .* allows 20%"):
        opened([entry], on_bad_row="skip").rows(0, 1)
    path.write_text('{"text": 5}\n')
    with pytest.raises(DataError, match=r"no row of '.*a.jsonl' is left to train on: .* rows that cannot become"):
        opened([entry], on_bad_row="skip", max_dropped_fraction=1.0).rows(0, 1)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="it has no rows"):
        opened([entry]).rows(0, 1)


def test_the_next_batches_are_made_while_a_step_is_computed(opened: Opener, tmp_path: Path) -> None:
    feed = StreamLoader(opened([texts(tmp_path, "a", 30)]), make_plan(1, 2), BatchLayout(pad_to=32))
    plain = [feed.batches(step)[0].input_ids for step in range(6)]
    again = replace(feed, stream=opened([texts(tmp_path, "a", 30)]))
    threads = set()

    def make(step: int) -> list:
        threads.add(threading.current_thread().name)
        return again.batches(step)

    with prefetching(again, 6, pin=False) as ahead:
        ahead.load = make
        for step in range(6):
            assert torch.equal(ahead(step)[0].input_ids, plain[step])
            if step < 5:
                assert ahead.ahead is not None
                ahead.ahead[1].result(timeout=30)  # comes without being asked for
    assert ahead.ahead is not None
    assert ahead.ahead[0] == 5, "none is made for a step that is not there"
    assert len(threads) == 2, "the first one here, the others beside"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_next_block_is_made_while_one_is_learned_and_changes_nothing(opened: Opener, tmp_path: Path) -> None:
    entry = texts(tmp_path, "a", 30)
    plain, ahead = opened([entry]), opened([entry], ahead=True)
    for i in range(40):
        assert ahead.rows(i, 1).sha256 == plain.rows(i, 1).sha256
        assert ahead.state_at(i) == plain.state_at(i)
        assert ahead.coming is not None
        ahead.coming.result(timeout=30)  # comes without being asked for
    assert ahead.next.block > 3
    assert (ahead.num_read, ahead.notes) == (plain.num_read, plain.notes), "what was made ahead is not counted yet"
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blocks")]


def test_a_block_that_is_not_needed_any_more_is_given_up(opened: Opener, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 99}) + "\n" + '{"text": 5}\n' * 100_000)  # seconds to read
    entry = {"path": str(path), "type": "completion"}
    stream = opened([entry], ahead=True, on_bad_row="skip", max_dropped_fraction=1.0, streaming_multipack_buffer_size=1)
    stream.rows(0, 1)
    stream.close()
    assert stream.coming is not None
    assert isinstance(stream.coming.exception(timeout=1), CancelledError)


def test_an_error_in_the_background_reaches_the_step_that_needs_the_batch(opened: Opener, tmp_path: Path) -> None:
    feed = StreamLoader(opened([texts(tmp_path, "a", 3)]), make_plan(1, 2), BatchLayout(pad_to=32))

    def make(step: int) -> list:
        if step == 1:
            time.sleep(0.01)
            raise DataError("row 7 is broken")
        return feed.batches(step)

    with prefetching(feed, 3, pin=False) as ahead:
        ahead.load = make
        assert isinstance(ahead, Prefetcher)
        ahead(0)
        with pytest.raises(DataError, match="row 7 is broken"):
            ahead(1)


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_bitwise_and_two_ranks_follow_the_same_curve(
    write_recipe: Callable[..., Path], train: Callable[..., list[dict]], tmp_path: Path
) -> None:
    entries = [texts(tmp_path, "a", 30) | {"weight": 2}, texts(tmp_path, "b", 7) | {"weight": 1}]
    recipe = write_recipe(
        datasets=entries, streaming=True, streaming_multipack_buffer_size=6, sequence_len=32, sample_packing=True,
        max_steps=6, save_steps=3, micro_batch_size=4, save_total_limit=0, test_datasets=[texts(tmp_path, "c", 3)],
        excess_length_strategy="truncate",
    )  # fmt: skip
    unbroken = train(recipe)
    out, other = tmp_path / "out", tmp_path / "resumed"
    assert (out / "checkpoints" / "step-00000003" / "stream.json").is_file()
    (other / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step-00000003").rename(other / "checkpoints" / "step-00000003")
    (other / "metrics.jsonl").write_text("".join((out / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]))
    resumed = train(recipe, f"output_dir={other}", "resume_from_checkpoint=true")
    steady = ("step", "loss", "grad_norm", "num_tokens", "eval_loss")
    assert [[row.get(key) for key in steady] for row in resumed] == [
        [row.get(key) for key in steady] for row in unbroken
    ]
    assert largest_difference(weights_of(out), weights_of(other)) == 0
    two = run_command(
        "finetuner.train", recipe, f"output_dir={tmp_path / 'two'}", "micro_batch_size=2", "save_steps=6", ranks=2
    )
    assert two.code == 0, two.text
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for one, row in zip(unbroken, rows, strict=True):
        assert row.get("num_tokens") == one.get("num_tokens")
        key = "loss" if "loss" in one else "eval_loss"
        assert row[key] == pytest.approx(one[key], rel=1e-5)
