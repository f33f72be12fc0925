"""The lines at the start of a run that say what became of every row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData
from finetuner.data.row_counts import RowCounts
from finetuner.recipe.sections import DataSection

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_folder: Path) -> Prepare:
    """prepare(rows, type="...", **keys of the recipe) -> the prepared rows."""

    def prepared(rows: list[Any], row_type: str = "prompt_completion", **keys: Any) -> PreparedData:
        return _prepare(tmp_path, tokenizer_folder, rows, row_type, keys)

    return prepared


def _prepare(folder: Path, tokenizer: Path, rows: list[Any], row_type: str, keys: dict[str, Any]) -> PreparedData:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = DataSection.model_validate({"datasets": [{"path": str(file), "type": row_type}], **keys})
    return prepare_documents(section, AutoTokenizer.from_pretrained(tokenizer), seed=1)


def pair(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"say {n}: ", "completion": "word " * n, **more}


def test_every_row_is_used_or_dropped_for_a_reason(prepare: Prepare) -> None:
    rows = [pair(1), pair(2), pair(400), {"prompt": "no completion"}, pair(1)]
    prepared = prepare(rows, sequence_len=64, on_bad_row="skip", dataset_exact_deduplication=True)
    (counts,) = prepared.row_counts
    assert (counts.num_rows, counts.num_used, counts.num_unaccounted) == (5, 2, 0)
    assert dict(counts.reasons) == {
        "longer than sequence_len": 1,
        "that cannot become text": 1,
        "equal to an earlier row": 1,
    }


def test_tokens_are_those_of_the_store(prepare: Prepare) -> None:
    prepared = prepare([pair(n) for n in (3, 5, 7)] * 2, sequence_len=64, dataset_exact_deduplication=True)
    (counts,) = prepared.row_counts
    assert counts.num_tokens == prepared.train.num_tokens
    assert counts.num_trained == prepared.train.num_trained


def test_held_out_and_cut_rows_count_as_used(prepare: Prepare) -> None:
    rows = [pair(n) for n in range(1, 61, 3)]
    prepared = prepare(rows, sequence_len=24, excess_length_strategy="truncate", val_set_size=0.5)
    (counts,) = prepared.row_counts
    assert counts.num_used + counts.reasons["without a trained token"] == 20
    assert counts.num_unaccounted == 0
    assert counts.num_tokens == prepared.train.num_tokens + prepared.held_out.num_tokens
    assert "cut to sequence_len" in counts.line()


def test_one_line_says_it_all(prepare: Prepare) -> None:
    prepared = prepare([pair(2), pair(400)], sequence_len=64)
    heading, line = prepared.rows_at_a_glance
    assert heading == "rows at a glance:"
    assert line.startswith("  rows.jsonl: 2 rows read, 1 used, 1 dropped (1 longer than sequence_len); ")
    assert line.endswith("ignored: nothing")


def test_turns_thoughts_and_ignored_names_are_counted() -> None:
    counts = RowCounts(num_rows=3, num_used=3, num_tokens=90, num_trained=30, num_lost_thoughts=2)
    counts.roles.update({"user": 4, "assistant": 3})
    counts.ignored.update({"id": 3, "messages[].id": 1})
    assert counts.line() == (
        "3 rows read, 3 used, 0 dropped; 30 of 90 tokens trained on; turns: user 4, assistant 3; "
        "2 thoughts that the chat template leaves out; ignored: id, messages[].id"
    )


def test_the_counts_come_back_from_json() -> None:
    counts = RowCounts(num_rows=3, num_used=2)
    counts.reasons["longer than sequence_len"] = 1
    assert RowCounts.from_json(json.loads(json.dumps(counts.as_json()))) == counts


def test_the_turns_of_chats_are_counted_by_role(prepare: Prepare) -> None:
    messages = [{"role": role, "content": "so be it"} for role in ("system", "user", "assistant", "user", "assistant")]
    prepared = prepare([{"messages": messages, "id": 7}], "chat_template")
    (counts,) = prepared.row_counts
    assert counts.roles == {"user": 2, "assistant": 2, "system": 1}
    assert counts.ignored == {"id": 1}
