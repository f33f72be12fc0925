"""Real rows through every named template: the text that transformers makes of them, and the answers learned of it."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.templates import BOS, ENDS, NAMED, UNTHOUGHT, chat, learn, real_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.chat_renderer import build_chat_renderer
from finetuner.data.chat_templates import TEMPLATES
from finetuner.data.messages import Conversation, MessageReader
from finetuner.data.template_sandbox import compile_template
from finetuner.data.tool_arguments import CallForms
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry

SHAREGPT = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
# file -> keys of the entry that reads its conversations
FILES: dict[str, dict[str, Any]] = {
    "alpaca_en_demo.json": {},
    "identity.json": {},
    "gsm8k_train.jsonl": {},
    "kto_en_demo.json": {},
    "dpo_en_demo.json": SHAREGPT,
    "sharegpt_dummy_conversation.json": SHAREGPT,
    "glaive_toolcall_en_demo.json": SHAREGPT,
    "reason_tool_use_demo_50.jsonl": {},
}
# templates that know of tools, and those that also know of the thoughts of the last file's rows
OF_FILE = {
    "glaive_toolcall_en_demo.json": ("qwen3", "qwen3_5", "qwen_25"),
    "reason_tool_use_demo_50.jsonl": ("qwen3", "qwen3_5"),
}


def conversations(name: str, count: int) -> Iterator[Conversation]:
    """Random rows of a file, as conversations."""
    text = real_file(name).read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    random.Random(16).shuffle(rows)
    reader = MessageReader.of(DatasetEntry.model_validate({"path": name, "type": "chat_template", **FILES[name]}))
    for row in itertools.islice(rows, count):
        if "instruction" in row:
            row = two_turns(f"{row['instruction']}\n\n{row.get('input', '')}".strip(), row["output"])
        elif "question" in row:
            row = two_turns(row["question"], row["answer"])
        elif "chosen" in row:
            row = {"conversations": [*row["conversations"], row["chosen"]]}
        yield reader.read({key: row[key] for key in ("messages", "conversations", "tools") if key in row})


def two_turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    more = [*ENDS, "<|END_RESPONSE|>", "[INST]", "[/INST]", "<｜Assistant｜>", "<start_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
    return tokenizer


def check(tokenizer: PreTrainedTokenizerBase, name: str, rows: list[Conversation]) -> int:
    """Compare what the renderer and transformers make of rows; return how many both take."""
    tokenizer.chat_template = TEMPLATES[name]
    renderer = build_chat_renderer(tokenizer, kwargs={}, eot_tokens=None, train_on_eos="turn", train_on_eot=None)
    forms = CallForms.of(compile_template(TEMPLATES[name], tokenizer.special_tokens_map))
    num_taken = 0
    for row in rows:
        messages = forms.convert(row.messages)
        try:
            expected = tokenizer.apply_chat_template(messages, tools=row.tools, tokenize=False)
        except Exception:  # the template's own refusal
            with pytest.raises(DataError):
                renderer.render(row)
            continue
        one = renderer.render(row)
        assert one.text == expected
        spans = [one.text[start:stop] for start, stop in one.spans]
        answers = [message for message in messages if message["role"] == "assistant"]
        if row.plain and row.tools is None:
            assert spans == learned_of(name, [message["content"] for message in answers])
        else:
            assert len(spans) == len(answers)
            for answer, span in zip(answers, spans, strict=True):
                assert answer["content"].strip() in span
                assert span.endswith("<|im_end|>")
                assert span.count("<tool_call>") == len(answer.get("tool_calls", ()))
        num_taken += 1
    return num_taken


def learned_of(name: str, answers: list[str]) -> list[str]:
    """What a named template has a model learn of plain answers."""
    lead, end, trims = NAMED[name]
    spans = [lead + (answer.strip() if trims else answer) + end for answer in answers]
    spans[-1] = UNTHOUGHT.get(name, "") + spans[-1]
    return spans


@pytest.mark.parametrize("file", FILES)
def test_real_rows_become_the_text_of_transformers_and_their_answers_are_learned(
    tokenizer: PreTrainedTokenizerBase, file: str
) -> None:
    rows = list(conversations(file, 8))
    for name in OF_FILE.get(file, NAMED):
        assert check(tokenizer, name, rows) >= (0 if name == "gemma" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_200_real_rows_become_the_text_of_transformers_and_their_answers_are_learned(
    tokenizer: PreTrainedTokenizerBase, file: str
) -> None:
    rows = list(conversations(file, 200))
    for name in OF_FILE.get(file, NAMED):
        num_taken = check(tokenizer, name, rows)
        assert num_taken == len(rows) or name.startswith(("gemma", "mistral"))  # no system turn, or in the first place


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral_v1", "gemma3"])
def test_a_tokenizer_that_adds_begin_of_text_adds_none_to_a_template(
    tokenizer_folder: Path, tmp_path: Path, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    adding = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adding
    tokenizer.add_special_tokens({"additional_special_tokens": list(ENDS)}, replace_extra_special_tokens=False)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = TEMPLATES[name]
    ids, _ = learn(tokenizer, [chat("a", "b", "c", "d")], tmp_path).train.document(0)
    assert (ids == tokenizer.bos_token_id).sum() == (name != "chatml")
    text = tokenizer.apply_chat_template(chat("a", "b", "c", "d")["messages"], tokenize=False)
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
