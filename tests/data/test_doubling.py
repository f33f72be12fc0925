"""Begin and end of text stand once around a text, whoever writes them: the row, the template or the tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from support.processes import exit_of
from support.rows import RecipeWriter, write_rows
from support.templates import BOS, EOS, chat, decoded, trained_texts
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.chat_templates import TEMPLATES
from finetuner.data.documents import CHAT_WORDS, OWN_ENDS, WORDS
from finetuner.data.formats.base import Rendered
from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData
from finetuner.data.text_ends import without_own_ends
from finetuner.recipe.sections import DataSection


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """The tests' tokenizer, made to put its begin-of-text first, as those of Llama and Mistral do."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    special = [(BOS, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=special)
    return tokenizer


def prepare(
    tokenizer: PreTrainedTokenizerBase, folder: Path, rows: list[dict[str, Any]], kind: Any, **keys: Any
) -> PreparedData:
    path = write_rows(folder / "rows.jsonl", rows)
    section = DataSection.model_validate({"datasets": [{"path": str(path), "type": kind}], "sequence_len": 512} | keys)
    return prepare_documents(section, tokenizer, seed=0)


ENDS = [
    "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "[|endofturn|]", "<end_of_turn>", "<turn|>", "<|end_of_text|>",
    "<|eom|>", "<|eot_id|>", "<|eot|>", "<|end|>",
]  # fmt: skip
OWN_FORMAT = {
    "format": f"{BOS}[INST] {{instruction}} [/INST]",
    "no_input_format": f"{BOS}[INST] {{instruction}} [/INST]",
}
# type, row with ends, the same row without them
CASES: dict[str, tuple[Any, dict[str, str], dict[str, str]]] = {
    "completion": ("completion", {"text": f"{BOS}[INST] a [/INST] b{EOS}"}, {"text": "[INST] a [/INST] b"}),
    "completion, white space around": ("completion", {"text": f"\n {BOS}a b{EOS}\n\n"}, {"text": "a b"}),
    "completion, begin alone": ("completion", {"text": f"{BOS}a b"}, {"text": "a b"}),
    "completion, end alone": ("completion", {"text": f"a b{EOS}"}, {"text": "a b"}),
    "prompt_completion": (
        "prompt_completion",
        {"prompt": f"{BOS}[INST] a [/INST]", "completion": f" b {EOS}"},
        {"prompt": "[INST] a [/INST]", "completion": " b "},
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "a", "input": "", "output": f"b{EOS}"},
        {"instruction": "a", "input": "", "output": "b"},
    ),
    "a format that writes the begin": (
        OWN_FORMAT,
        {"instruction": "a", "output": f"b{EOS}"},
        {"instruction": "a", "output": "b"},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("on_inputs", [False, True])
def test_a_row_with_its_own_ends_becomes_what_it_would_be_without_them(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, on_inputs: bool
) -> None:
    kind, with_ends, without = CASES[name]
    prepared = prepare(tokenizer, tmp_path, [with_ends, without], kind, train_on_inputs=on_inputs)
    (ids, labels), (expected_ids, expected_labels) = (prepared.train.document(i) for i in range(2))
    assert ids.tolist() == expected_ids.tolist() and labels.tolist() == expected_labels.tolist()
    assert (ids == tokenizer.bos_token_id).sum() == 1 and (ids == tokenizer.eos_token_id).sum() == 1
    assert labels[0] != tokenizer.bos_token_id and labels[-1] == tokenizer.eos_token_id
    by_format = isinstance(kind, dict)  # it brings the begin to the other row too
    assert prepared.counts == {OWN_ENDS: 2 if by_format else 1}


def test_a_text_of_several_turns_keeps_the_ends_between_them(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = f"{BOS}a{EOS}{BOS}b{EOS}"
    ids, _ = prepare(tokenizer, tmp_path, [{"text": text}], "completion").train.document(0)
    assert decoded(tokenizer, ids) == text
    assert (ids == tokenizer.bos_token_id).sum() == 2 == (ids == tokenizer.eos_token_id).sum()


def test_a_rendered_chat_in_a_text_column_is_read_as_tokens_with_one_end(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.eos_token = "<|im_end|>"
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    ids, labels = prepare(tokenizer, tmp_path, [{"text": text}], "completion").train.document(0)
    turns = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [i for i in ids.tolist() if i in turns] == turns * 2
    assert trained_texts(tokenizer, ids, labels) == [text.rstrip()]


def test_struck_out_text_of_html_stays_words(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Strike it.", "completion": f" {BOS}old{EOS}"},
        {"prompt": f"{BOS}old{EOS} means", "completion": " gone"},
    ]
    prepared = prepare(tokenizer, tmp_path, rows, "prompt_completion")
    for i, row in enumerate(rows):
        ids, labels = prepared.train.document(i)
        assert decoded(tokenizer, ids[1:-1]) == row["prompt"] + row["completion"]
        assert trained_texts(tokenizer, ids, labels) == [row["completion"] + EOS]
        assert (ids == tokenizer.bos_token_id).sum() == 1 == (ids == tokenizer.eos_token_id).sum()
    assert prepared.counts == {WORDS: 2}  # and said


def test_a_rendered_prompt_in_a_cell_whose_tokens_are_words_is_said(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    row = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "completion": "yes"}
    prepared = prepare(tokenizer, tmp_path, [row, {"prompt": "a", "completion": "b"}], "prompt_completion")
    assert prepared.counts == {WORDS: 1} and len(prepared.train) == 2
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in prepared.train.document(0)[0].tolist()
    text = {"text": row["prompt"] + row["completion"]}  # the type that reads tokens
    assert not prepare(tokenizer, tmp_path, [text], "completion").counts


def test_an_answer_that_brings_the_end_of_its_turn_is_said(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES["chatml"]
    prepared = prepare(tokenizer, tmp_path, [chat("a", "b<|im_end|>"), chat("a", "b")], "chat_template")
    assert prepared.counts == {CHAT_WORDS: 1} and len(prepared.train) == 2


def test_without_a_begin_of_the_tokenizer_the_one_of_a_text_stays(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids, _ = prepare(tokenizer, tmp_path, [{"text": f"{BOS}a"}], "completion").train.document(0)
    assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1


def test_segments_and_chats_write_their_own_ends(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    segments = [{"text": f"{BOS}a", "label": False}, {"text": f" b{EOS}", "label": True}]
    prepared = prepare(tokenizer, tmp_path, [{"segments": segments}], "input_output")
    assert decoded(tokenizer, prepared.train.document(0)[0]) == f"{BOS}a b{EOS}" and not prepared.counts


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_named_template_writes_the_begin_of_text_once_at_most(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS}, replace_extra_special_tokens=False)
    ids, _ = prepare(tokenizer, tmp_path, [chat("a?", "b.")], "chat_template").train.document(0)
    assert (ids == tokenizer.bos_token_id).sum() == TEMPLATES[name].count("bos_token or ''")
    assert TEMPLATES[name].count("bos_token or ''") <= 1


def test_a_text_that_is_nothing_but_its_ends_is_blank() -> None:
    for text in ("<s></s>", "<s>", "</s>", " <s> </s> "):
        rendered = Rendered(text, ((0, len(text)),), wraps=True)
        assert not without_own_ends(rendered, "<s>", "</s>").text.strip()


def test_one_token_for_begin_and_end_is_taken_at_both() -> None:
    text = "<e>a<e>"
    rendered = Rendered(text, ((0, len(text)),), wraps=True, contents=((0, len(text)),))
    assert without_own_ends(rendered, "<e>", "<e>") == Rendered("a", ((0, 1),), wraps=True, contents=((0, 1),))
    lone = Rendered("a<e>", ((0, 4),), wraps=True, contents=((0, 4),))
    assert without_own_ends(lone, "<e>", "<e>").text == "a"


def test_the_data_command_says_once_how_many_rows_bring_their_ends(
    write_recipe: RecipeWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "ends.jsonl", [{"text": f"row {i}{EOS}"} for i in range(3)] + [{"text": "row"}])
    recipe = write_recipe(datasets=[{"path": str(rows), "type": "completion"}])
    for command in ("data", "preview"):
        assert exit_of(command, recipe) == 0
        assert capsys.readouterr().out.count(OWN_ENDS) == 1
