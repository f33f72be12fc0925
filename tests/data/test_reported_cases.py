"""Cases of reports that no single room has to itself: the rules of what is learned, streams and packs on new templates.

What is right for the other cases stands with the files, row types, templates and recipes that they are about.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rows import write_rows
from support.template_families import CLOSED_BY_NEXT, TEMPLATES, TOKENS, plain
from support.templates import learn, trained_texts
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.row_stream import RowStream
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

ROUNDS = [
    {"role": "user", "content": "Capital?"},
    {"role": "assistant", "content": "Lima."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So it is.", "reasoning_content": "It is on the coast."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = [
    {"role": "user", "content": "One more?"},
    {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "add"},
    {"role": "assistant", "content": "Two."},
]
PLAIN = [{key: text for key, text in message.items() if key != "reasoning_content"} for message in ROUNDS]
HEADER, THOUGHT = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>It is on the coast.<|end|>"
CHANNELS = (f"{HEADER}Lima.", "<|end|>", f"{THOUGHT}<|start|>assistant{HEADER}So it is.", "<|return|>")


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS}, replace_extra_special_tokens=False)
    return tokenizer


def learned(tokenizer: PreTrainedTokenizerBase, folder: Path, messages: list[dict[str, Any]], **keys: Any) -> list[str]:
    """What is learned of one conversation; `keys` of the recipe, and of its one source under `entry`."""
    entry = keys.pop("entry", {})
    rows = [{"messages": messages}]
    path = write_rows(folder / "rows.jsonl", rows)
    data = learn(tokenizer, rows, folder, datasets=[{"path": str(path), "type": "chat_template"} | entry], **keys)
    return trained_texts(tokenizer, *data.train.document(0))


# --- the rules of what is learned, where an answer has a header, a thought and several ends ---


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("turn", [CHANNELS[0] + CHANNELS[1], CHANNELS[2] + CHANNELS[3]]),
        ("last", [CHANNELS[0], CHANNELS[2] + CHANNELS[3]]),
        ("none", [CHANNELS[0], CHANNELS[2]]),
        ("all", ["<|end|>", CHANNELS[0] + CHANNELS[1], "<|end|>", CHANNELS[2] + CHANNELS[3]]),
    ],
)
def test_a_header_and_a_thought_are_learned_whichever_ends_are(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ends: str, expected: list[str]
) -> None:
    tokenizer.chat_template = plain(TEMPLATES["channels"])
    eot_tokens = ["<|end|>", "<|return|>", "<|call|>"]
    assert learned(tokenizer, tmp_path, ROUNDS, eot_tokens=eot_tokens, entry={"train_on_eos": ends}) == expected


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("turn", ["Lima.<|user|>", "So it is.<|user|>"]),
        ("last", ["Lima.", "So it is.<|user|>"]),
        ("none", ["Lima.", "So it is."]),
        ("all", ["Lima.<|user|>", "So it is.<|user|>"]),  # the token behind a question begins the answer
    ],
)
def test_the_next_roles_token_follows_the_rule_of_ends(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ends: str, expected: list[str]
) -> None:
    tokenizer.chat_template = CLOSED_BY_NEXT
    entry = {"train_on_eos": ends}
    assert learned(tokenizer, tmp_path, PLAIN, eot_tokens=["<|user|>"], entry=entry) == expected


def test_questions_that_are_learned_are_learned_without_the_templates_words(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = plain(TEMPLATES["channels"])
    both = {"roles_to_train": ["user", "assistant"]}
    answers = [CHANNELS[0] + CHANNELS[1], CHANNELS[2] + CHANNELS[3]]
    assert learned(tokenizer, tmp_path, ROUNDS, entry=both) == [
        "Capital?<|end|>",
        answers[0],
        "Why?<|end|>",
        answers[1],
    ]
    assert learned(tokenizer, tmp_path, ROUNDS, entry={"roles_to_train": ["user"]}) == [
        "Capital?<|end|>",
        "Why?<|end|>",
    ]
    assert learned(tokenizer, tmp_path, ROUNDS, entry=both | {"train_on_last_turn": True}) == [answers[1]]
    last = both | {"message_field_training": "learn"}
    flagged = [message | {"learn": number == 3} for number, message in enumerate(ROUNDS)]
    assert learned(tokenizer, tmp_path, flagged, entry=last) == [answers[1]]


def test_results_within_the_models_turn_are_learned_only_with_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = plain(TEMPLATES["results inside"])
    call = '<think>I add.</think><|call>add{"a": 1}<call|>'
    assert learned(tokenizer, tmp_path, CALLED) == [call, "Two.<turn|>"]
    (whole,) = learned(tokenizer, tmp_path, CALLED, train_on_inputs=True)
    assert f"One more?<turn|>\n<|turn>model\n{call}<|result>2<result|>Two.<turn|>" in whole


def test_an_ending_that_is_added_to_the_text_is_learned_with_the_whole_text_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = CLOSED_BY_NEXT
    (whole,) = learned(tokenizer, tmp_path, PLAIN, eot_tokens=["<|user|>"], train_on_inputs=True)
    assert whole.endswith("<|assistant|>\nSo it is.<|user|>")


def test_a_call_that_ends_a_row_with_an_unnamed_token_is_told_which(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template = (
        plain(TEMPLATES["results inside"])
        .replace("<call|>", "<call|><|result>")
        .replace("<|result>{{ m.content }}", "{{ m.content }}")
    )
    tokenizer.chat_template = template
    with pytest.raises(
        DataError, match=r"ends message 1 with '<\|result>'.*`eot_tokens: \['<turn\|>', '<\|result>'\]`"
    ):
        learned(tokenizer, tmp_path, CALLED[:2], eot_tokens=["<turn|>"])
    call = '<think>I add.</think><|call>add{"a": 1}<call|><|result>'
    assert learned(tokenizer, tmp_path, CALLED[:2], eot_tokens=["<turn|>", "<|result>"]) == [call]


def test_a_system_text_that_a_template_writes_before_a_last_question_alone_can_be_left_out_on_purpose(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Some public templates of Mistral write it before the very last message, which an answer never is."""
    tokenizer.chat_template = (
        "{%- for m in messages if m.role != 'system' -%}{%- if m.role == 'user' -%}"
        "[INST]{{ messages[0].content if loop.last and messages[0].role == 'system' }}{{ m.content }}[/INST]"
        "{%- else -%}{{ m.content + eos_token }}{%- endif -%}{%- endfor -%}"
    )
    row = [{"role": "system", "content": "Be brief."}, *PLAIN]
    with pytest.raises(DataError, match=r"message 0 \(system\): it leaves it out.*`drop_system_message: true`"):
        learned(tokenizer, tmp_path, row)
    texts = learned(tokenizer, tmp_path, row, entry={"drop_system_message": True})
    assert texts == learned(tokenizer, tmp_path, PLAIN) == ["Lima.<|endoftext|>", "So it is.<|endoftext|>"]


# --- the same rows prepared, packed and streamed ---


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["channels", "opened thought", "results inside"])
def test_a_stream_makes_the_tokens_of_the_prepared_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, packing: bool
) -> None:
    tokenizer.chat_template = plain(TEMPLATES[name])
    rows = [{"messages": messages} for messages in (CALLED, PLAIN, CALLED[:2], PLAIN[:2])]
    entry = {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "type": "chat_template"}
    prepared = learn(tokenizer, rows, tmp_path, datasets=[entry])
    section = DataSection.model_validate({"datasets": [entry], "sequence_len": 512, "streaming": True})
    stream = RowStream(section, tokenizer, 0, packing=packing)
    drawn = stream.rows(0, 40)  # ten passes or more
    streamed = {as_pair(*document) for row in range(40) for document in drawn.documents(row)}
    assert streamed == {as_pair(*prepared.train.document(number)) for number in range(len(rows))}
    assert len(streamed) == len(rows)


def as_pair(ids: Any, labels: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(np.asarray(ids).tolist()), tuple(np.asarray(labels).tolist())
