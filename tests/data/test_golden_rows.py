"""Real rows in every format: the whole text that a model sees of each, and what it learns of it, to the letter.

The expected texts are written here from the rows, without finetuner's code. The tokenizer is byte-level, so that a
document's tokens decode to exactly its text.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pytest
from support.places import SHARED_DATA
from support.rows import write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.documents import BLANK
from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData
from finetuner.data.token_store import IGNORE_INDEX
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

EOS = "<|endoftext|>"
INTRO = "Below is an instruction that describes a task"
APT = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"


class Golden(NamedTuple):
    """Pieces of a document: (text, whether it is learned), in order; neighbors of a kind may be one."""

    pieces: list[tuple[str, bool]]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def rows_of(name: str) -> list[dict[str, Any]]:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def learned(tokenizer: PreTrainedTokenizerBase, prepared: PreparedData) -> list[list[tuple[str, bool]]]:
    """Each document as its runs of learned and unlearned text."""
    documents = []
    for i in range(len(prepared.train)):
        ids, labels = prepared.train.document(i)
        runs: list[tuple[list[int], bool]] = []
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if not runs or runs[-1][1] != (label != IGNORE_INDEX):
                runs.append(([], label != IGNORE_INDEX))
            runs[-1][0].append(token)
        documents.append([(tokenizer.decode(tokens), trained) for tokens, trained in runs])
    return documents


def merged(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    runs: list[tuple[str, bool]] = []
    for text, trained in pieces:
        if runs and runs[-1][1] == trained:
            runs[-1] = (runs[-1][0] + text, trained)
        elif text:
            runs.append((text, trained))
    return runs


def prepared_from(tokenizer: PreTrainedTokenizerBase, entry: dict[str, Any], **keys: Any) -> PreparedData:
    values = {"datasets": [entry], "sequence_len": 1_000_000, "max_dropped_fraction": 1.0} | keys
    return prepare_documents(DataSection.model_validate(values), tokenizer, seed=0)


# --- instructions ---


def alpaca(row: dict[str, Any]) -> list[tuple[str, bool]]:
    given = ", paired with an input that provides further context" if row["input"] else ""
    more = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return [(f"{INTRO}{given}{APT}{row['instruction']}{more}\n\n### Response:\n", False), (row["output"] + EOS, True)]


SQUAD = {
    "system_prompt": "Answer from the text.", "system_format": "<<{system}>>\n", "field_system": "system",
    "field_instruction": "question", "field_input": "context", "field_output": "output",
    "format": "[INST] {instruction} {input} [/INST]", "no_input_format": "[INST] {instruction} [/INST]",
}  # fmt: skip


def squad(row: dict[str, Any]) -> list[tuple[str, bool]]:
    prompt = f"<<Answer from the text.>>\n[INST] {row['question']} {row['context']} [/INST]"
    return [(prompt, False), (row["output"] + EOS, True)]


def gsm8k(row: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(f"Q: {row['question']}\nA: ", False), (row["answer"] + EOS, True)]


def shared(name: str) -> str:
    return str(SHARED_DATA / name)


INSTRUCTIONS: dict[str, tuple[str, Any, Callable[[dict[str, Any]], list[tuple[str, bool]]], int]] = {
    "alpaca": ("alpaca_en_demo.json", "alpaca", alpaca, 150),
    "alpaca, identity": ("identity.json", "alpaca", alpaca, 91),
    "SQuAD's mapping": ("squad_for_llms.jsonl", SQUAD, squad, 100),
    "a mapping without input": (
        "gsm8k_train.jsonl",
        {"field_instruction": "question", "field_output": "answer", "no_input_format": "Q: {instruction}\nA: "},
        gsm8k,
        150,
    ),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_real_instructions_become_their_format_to_the_letter(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    file, kind, expected, count = INSTRUCTIONS[name]
    rows = rows_of(file)[:count]
    found = learned(tokenizer, prepared_from(tokenizer, {"path": shared(file), "type": kind, "max_samples": count}))
    assert len(rows) == count
    assert found == [merged(expected(row)) for row in rows]


def test_optional_columns_may_be_missing_from_a_row_and_the_others_may_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    squad_rows = rows_of("squad_for_llms.jsonl")[:4]
    own = squad_rows[1] | {"system": "Be brief."}
    bare = {key: squad_rows[2][key] for key in ("question", "output")}
    rows = [squad_rows[0], own, bare, squad_rows[3] | {"context": None, "system": None}]
    entry = {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "type": SQUAD}
    prompts = [document[0][0] for document in learned(tokenizer, prepared_from(tokenizer, entry))]
    assert prompts == [
        squad(rows[0])[0][0],
        f"<<Be brief.>>\n[INST] {own['question']} {own['context']} [/INST]",
        f"<<Answer from the text.>>\n[INST] {bare['question']} [/INST]",
        f"<<Answer from the text.>>\n[INST] {rows[3]['question']} [/INST]",
    ]
    for column in ("question", "output"):
        broken = [rows[0], {key: cell for key, cell in rows[1].items() if key != column}]
        write_rows(tmp_path / "rows.jsonl", broken)
        with pytest.raises(DataError, match=f"rows.jsonl: row 1: it has no column '{column}'; its columns are: id,"):
            prepared_from(tokenizer, entry)


# --- chats ---


def chatml(turns: list[tuple[str, str]], trained: tuple[str, ...] = ("assistant",)) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    for role, text in turns:
        pieces += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", role in trained), ("\n", False)]
    return merged(pieces)


SHAREGPT = {
    "type": "chat_template", "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}  # fmt: skip
NAMES = {"human": "user", "gpt": "assistant", "system": "system"}
CHATS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("kto_en_demo.json", {"type": "chat_template", "unused_columns": ["label"]}),
    "ShareGPT": ("sharegpt_dummy_conversation.json", SHAREGPT),
    "ShareGPT, named by hand": (
        "sharegpt_dummy_conversation.json",
        SHAREGPT | {"roles": {"assistant": ["gpt"], "user": ["human"]}, "roles_to_train": ["assistant"]},
    ),
    "questions are learned": ("sharegpt_dummy_conversation.json", SHAREGPT | {"roles_to_train": ["human"]}),
}


@pytest.mark.parametrize("name", CHATS)
def test_real_chats_become_their_template_to_the_letter(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    file, keys = CHATS[name]
    rows = rows_of(file)[:100]
    entry = {"path": shared(file), "max_samples": 100, **keys}
    found = learned(tokenizer, prepared_from(tokenizer, entry, chat_template="chatml"))
    trained = tuple(NAMES.get(role, role) for role in keys.get("roles_to_train", ("assistant",)))
    expected = []
    for row in rows:
        if "messages" in row:
            turns = [(message["role"], message["content"]) for message in row["messages"]]
        else:
            turns = [(NAMES[message["from"]], message["value"]) for message in row["conversations"]]
        expected.append(chatml(turns, trained))
    assert found == expected


# --- the other types, from the same rows ---


def test_real_rows_as_segments_prompts_and_tokens_learn_the_answer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = rows_of("gsm8k_train.jsonl")[:100]
    expected = [merged(gsm8k(row)) for row in rows]
    prompts = [{"prompt": f"Q: {row['question']}\nA: ", "completion": row["answer"]} for row in rows]
    segments = [
        {
            "segments": [
                {"text": "Q: ", "label": False}, {"text": row["question"] + "\nA: ", "label": False},
                {"text": row["answer"], "label": True}, {"text": EOS, "label": True},
            ]
        }
        for row in rows
    ]  # fmt: skip
    tokens = []
    for row in prompts:
        asked, answer = (tokenizer.encode(text, add_special_tokens=False) for text in row.values())
        ids = [*asked, *answer, tokenizer.eos_token_id]
        tokens.append({"input_ids": ids, "labels": [IGNORE_INDEX] * len(asked) + ids[len(asked) :]})
    for kind, table in (("prompt_completion", prompts), ("input_output", segments), (None, tokens)):
        entry = {"path": str(write_rows(tmp_path / f"{kind}.jsonl", table)), "type": kind}
        assert learned(tokenizer, prepared_from(tokenizer, entry)) == expected, kind


def test_real_texts_are_learned_whole_line_by_line_or_as_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = rows_of("c4_demo.jsonl")[:60]
    entry = {"path": shared("c4_demo.jsonl"), "type": "completion", "max_samples": 60}
    assert learned(tokenizer, prepared_from(tokenizer, entry)) == [[(row["text"] + EOS, True)] for row in rows]
    for name in ("wikitext2_valid.txt", "tinyshakespeare.txt"):
        lines = (SHARED_DATA / name).read_bytes().decode().split("\n")[:150]
        entry = {"path": shared(name), "type": "completion", "max_samples": len(lines)}
        prepared = prepared_from(tokenizer, entry)
        assert learned(tokenizer, prepared) == [[(line + EOS, True)] for line in lines if line.strip()]
        assert prepared.counts[BLANK] == sum(not line.strip() for line in lines)
    whole = (SHARED_DATA / "wiki_demo.txt").read_bytes()[:50_000].decode(errors="ignore")
    (tmp_path / "wiki.txt").write_bytes(whole.encode())
    entry = {"path": str(tmp_path / "wiki.txt"), "type": "completion", "sample_by": "document"}
    assert learned(tokenizer, prepared_from(tokenizer, entry)) == [[(whole + EOS, True)]]


# --- where they lie ---


def test_real_rows_are_the_same_from_arrow_parquet_a_saved_folder_and_the_hubs_cache(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, hf_cache: Path
) -> None:
    rows = rows_of("alpaca_en_demo.json")[:60]
    expected = [merged(alpaca(row)) for row in rows]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    arrow = table.data.table
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, arrow.schema) as out:
        out.write_table(arrow)
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "one.jsonl", rows[:20])
    write_rows(tmp_path / "folder" / "two.jsonl", rows[20:])
    write_rows(tmp_path / "folder" / "other.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    builder = datasets.load_dataset_builder(
        "parquet", data_files={"train": str(tmp_path / "rows.parquet")}, cache_dir=str(tmp_path / "cache")
    )
    builder.download_and_prepare()
    place = hf_cache / "someone___alpaca" / "english" / "0.0.0" / "abcdef"
    place.mkdir(parents=True)
    for file in Path(builder.cache_dir).iterdir():
        (place / file.name.replace("parquet-", "alpaca-")).write_bytes(file.read_bytes())
    info = place / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"config_name": "english"}))
    entries: list[dict[str, Any]] = [
        {"path": str(tmp_path / "rows.parquet")},
        {"path": str(tmp_path / "saved")},
        {"path": str(tmp_path / "rows.arrow")},
        {"path": str(tmp_path / "folder"), "data_files": ["one.jsonl", "two.jsonl"]},
        {"path": "someone/alpaca", "name": "english"},
    ]
    for entry in entries:
        prepared = prepared_from(tokenizer, {**entry, "type": "alpaca"})
        assert learned(tokenizer, prepared) == expected, entry
    sliced = prepared_from(tokenizer, {"path": "someone/alpaca", "type": "alpaca", "split": "train[10%:25%]"})
    assert learned(tokenizer, sliced) == expected[6:15]
    with pytest.raises(DataError, match=r"(?s)cannot read the dataset 'someone/alpaca'.*german.*Check the name"):
        prepared_from(tokenizer, {"path": "someone/alpaca", "name": "german", "type": "alpaca"})
