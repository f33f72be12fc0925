"""Rows become text and trained spans: exactly the answers with their ends, whatever the template and the contents."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.places import ROOT
from support.templates import BOS, CONTENTS, EOS, chat, decoded, learn, real_file, trained_texts
from support.tiny import CHATML
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetuner.data.cache import _code_facts
from finetuner.data.documents import CHAT_WORDS
from finetuner.data.formats import load_format
from finetuner.data.prepare import prepare_documents
from finetuner.data.token_store import IGNORE_INDEX
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry
from finetuner.recipe.sections.datasets import KEYS_OF_TYPE, ROW_TYPES

EXTRA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + {'assistant': 'model'}.get(m.role, m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% else %}"
    "{{ m.role | upper + ': ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SPACED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + ' \n<|end|>' }}{% if not loop.last %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# name -> (template, what an answer begins with that is not in the prompt, what ends it, whether contents are trimmed)
TEMPLATES = {
    "chatml": (CHATML, "", "<|im_end|>", False),
    "llama": (LLAMA, "", "<|eot_id|>", False),
    "mistral": (MISTRAL, " ", EOS, False),
    "vicuna": (VICUNA, "", EOS, False),
    "vicuna, asked without the space": (VICUNA.replace("ASSISTANT: {% endif", "ASSISTANT:{% endif"), " ", EOS, False),
    "zephyr": (ZEPHYR, "", EOS, False),
    "gemma": (GEMMA, "", "<end_of_turn>", True),
    "spaced": (SPACED, "", " \n<|end|>", False),
    "marked": (MARKED, "", "<|im_end|>", False),
}


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """The tests' tokenizer, with tokens for the templates above, free to be changed."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA}, replace_extra_special_tokens=False)
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    special = [(BOS, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=special)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


# --- alpaca ---

ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet me.", "input": "", "output": "Hello!\nHow are you?"},
    {"instruction": "  odd ", "input": None, "output": " spaces "},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Newlines", "input": "x", "output": "\n\nafter two"},
]
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nGreet me.\n\n### Response:\n"
)


@pytest.mark.parametrize("with_bos", [False, True])
def test_alpaca_learns_the_output_and_its_end_after_the_stanford_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, with_bos: bool
) -> None:
    if with_bos:
        adds_bos(tokenizer)
    store = learn(tokenizer, ROWS, tmp_path).train
    assert len(store) == len(ROWS)
    for i, row in enumerate(ROWS):
        ids, labels = store.document(i)
        assert trained_texts(tokenizer, ids, labels) == [row["output"] + EOS]
        assert (ids == tokenizer.bos_token_id).sum() == with_bos
        assert (ids == tokenizer.eos_token_id).sum() == 1
        assert ids[0] == tokenizer.bos_token_id or not with_bos
    start = BOS if with_bos else ""
    assert decoded(tokenizer, store.document(0)[0]) == start + WITH_INPUT + "3" + EOS
    assert decoded(tokenizer, store.document(1)[0]) == start + WITHOUT_INPUT + ROWS[1]["output"] + EOS


def test_a_missing_null_and_empty_input_are_one_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"instruction": "Greet me.", "output": "Hello!"}
    store = learn(tokenizer, [row, row | {"input": None}, row | {"input": ""}], tmp_path).train
    assert len({store.document(i)[0].tobytes() for i in range(3)}) == 1


def test_a_token_across_the_border_is_cut(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"instruction": "Greet me.", "input": "", "output": "\n\nHello"}
    whole = tokenizer(WITHOUT_INPUT + row["output"], return_offsets_mapping=True)["offset_mapping"]
    border = len(WITHOUT_INPUT)
    assert any(a < border < b for a, b in whole), "this row is meant to merge a newline of each side"
    ids, labels = learn(tokenizer, [row], tmp_path).train.document(0)
    assert trained_texts(tokenizer, ids, labels) == ["\n\nHello" + EOS]
    prompt = tokenizer(WITHOUT_INPUT)["input_ids"]
    assert list(ids[: len(prompt)]) == prompt, "the prompt is tokenized as when the model is used"


@pytest.mark.parametrize("output", ["if x:\n    return  y", "   indented", "a  b   c ", "  ", " x"])
def test_offsets_without_leading_spaces_change_nothing(
    tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, tmp_path: Path, output: str
) -> None:
    rows = [{"instruction": "a", "output": output}, chat("a ", output)]
    trimming = AutoTokenizer.from_pretrained(tokenizer_folder)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-NeoX's does
    for row in rows:
        ids, labels = learn(tokenizer, [row], tmp_path).train.document(0)
        trimmed_ids, trimmed_labels = learn(trimming, [row], tmp_path).train.document(0)
        assert (ids == trimmed_ids).all()
        assert (labels == trimmed_labels).all()


def test_train_on_inputs_learns_all_but_the_bos(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    store = learn(adds_bos(tokenizer), ROWS, tmp_path, train_on_inputs=True).train
    for i in range(len(ROWS)):
        ids, labels = store.document(i)
        assert list(labels) == [IGNORE_INDEX, *ids[1:]]
    ids, labels = learn(tokenizer, [chat("a", "b")], tmp_path, train_on_inputs=True).train.document(0)
    assert (ids == labels).all()


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        learn(tokenizer, ROWS, tmp_path)
    assert learn(tokenizer, [chat("a", "b")], tmp_path).train.num_trained > 0  # the template has its own end


# --- chat templates ---


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("with_bos", [False, True])
def test_every_answer_is_learned_with_its_end_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, with_bos: bool
) -> None:
    tokenizer.chat_template, lead, end, trims = TEMPLATES[name]
    if with_bos:
        adds_bos(tokenizer)
    rows = [chat("hi", content) for content in CONTENTS]
    rows += [chat(content, "hi", content, content) for content in CONTENTS]
    rows += [chat(*CONTENTS[i:], *CONTENTS[:i]) for i in range(0, len(CONTENTS), 5)]
    rows += [chat("a", "a", "a", "a", system="a")] if name != "mistral" else []
    prepared = learn(tokenizer, rows, tmp_path)
    assert all(note.endswith(CHAT_WORDS) for note in prepared.notes)  # some contents are words like special tokens
    for i, row in enumerate(rows):
        ids, labels = prepared.train.document(i)
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        expected = [lead + (answer.strip() if trims else answer) + end for answer in answers]
        assert trained_texts(tokenizer, ids, labels) == expected
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert decoded(tokenizer, ids) == rendered
        assert (ids == tokenizer.bos_token_id).sum() == rendered.count(BOS) == ("bos_token" in tokenizer.chat_template)


@pytest.fixture(scope="module", params=["prepended to all", "first only"])
def sentencepiece(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A tokenizer as Llama 2's and Mistral's: a text begins with a space, and words have theirs in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if request.param == "first only":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["plain two words assistant hi  a   b    c " * 20], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


@pytest.mark.parametrize("name", ["mistral", "vicuna", "vicuna, asked without the space", "zephyr"])
def test_an_answer_has_no_space_that_the_template_does_not_write(
    sentencepiece: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    sentencepiece.chat_template, lead, end, _ = TEMPLATES[name]
    rows = [chat("hi", content, "hi", content) for content in CONTENTS]
    store = learn(sentencepiece, rows, tmp_path).train
    for i, content in enumerate(CONTENTS):
        ids, labels = store.document(i)
        assert trained_texts(sentencepiece, ids, labels) == [lead + content + end] * 2
        if lead:  # no border lies within a token: the whole is tokenized as it is when the model is used
            rendered = sentencepiece.apply_chat_template(rows[i]["messages"], tokenize=False)
            assert list(ids) == sentencepiece(rendered, add_special_tokens=False)["input_ids"]


def test_a_special_token_that_swallows_spaces_leaves_none_behind(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|stop|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    swallowing = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "stop")]
    tokenizer.add_special_tokens({"additional_special_tokens": swallowing}, replace_extra_special_tokens=False)
    for answer in ("plain", "  indented", "\nline"):
        row = chat("hi", answer, "hi", "b")
        ids, labels = learn(tokenizer, [row], tmp_path).train.document(0)
        assert trained_texts(tokenizer, ids, labels) == [answer + "<|stop|>", "b<|stop|>"]
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert list(ids[: len(prompt_ids)]) == prompt_ids
    rendered = tokenizer.apply_chat_template(chat("hi", "plain", "hi", "b")["messages"], tokenize=False)
    ids, _ = learn(tokenizer, [chat("hi", "plain", "hi", "b")], tmp_path).train.document(0)
    assert list(ids) == tokenizer(rendered)["input_ids"]


def test_marked_and_unmarked_templates_give_the_same_documents(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [chat(*CONTENTS), chat("a", "b", "c", "d", system="s"), chat("a", "\n\nb")]
    stores = []
    for template in (CHATML, MARKED, MARKED.replace("{% gen", "{%- gen"), MARKED.replace("{% gen", "{%gen")):
        tokenizer.chat_template = template
        stores.append(learn(tokenizer, rows, tmp_path).train)
    for store in stores[1:]:
        assert (store.ids == stores[0].ids).all()
        assert (store.labels == stores[0].labels).all()


def test_keys_that_other_messages_have_are_not_given_to_a_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = CHATML.replace("message['role'] +", "message['role'] + message.get('name', '') +")
    rows = [chat("a", "b"), chat("a", "b")]
    rows[1]["messages"][0]["name"] = " Ann"
    store = learn(tokenizer, rows, tmp_path).train
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)  # a table gives all other messages a null for it
    entry = {"path": str(path), "type": "chat_template"}
    of_table = prepare_documents(DataSection.model_validate({"datasets": [entry]}), tokenizer, seed=0).train
    assert (of_table.ids == store.ids).all()
    assert decoded(tokenizer, store.document(0)[0]).startswith("<|im_start|>user\na")
    assert decoded(tokenizer, store.document(1)[0]).startswith("<|im_start|>user Ann\na")


THINKING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
BAD_TEMPLATES = {
    "upper-cases": (
        CHATML.replace("message['content']", "message['content'] | upper"),
        "does not write the text of message 0",
    ),
    "drops the system": (
        CHATML.replace("in messages", "in messages if message.role != 'system'"),
        r"does not write the text of message 0 \(system\): it leaves it out, or changes it",
    ),
    "repeats an answer": (CHATML + "{{ messages[4]['content'] }}", "writes a text of message 4 twice"),
    "drops the empty": (CHATML.replace("in messages", "in messages if message.content"), "changes the text of message"),
    "replaces": (CHATML.replace("message['content']", "message['content'].replace('so', '')"), "changes the text"),
    "ends with text": (CHATML.replace("<|im_end|>", "</s>"), "a model trained on it would not learn where to stop"),
    "ends without an end": (CHATML.replace("<|im_end|>\n", ""), "would not learn where to stop"),
    "raises": ("{{ raise_exception('no ' + messages[0].role) }}", "refuses this conversation: no system"),
    "is broken": ("{% for %}", "refuses this conversation"),
    "adds a number": ("{{ 1 + messages[0].content }}", "refuses this conversation"),
    "divides by zero": ("{{ 1 / 0 }}", "refuses this conversation"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_whose_answers_cannot_be_told_is_refused_with_the_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    tokenizer.chat_template, message = BAD_TEMPLATES[name]
    with pytest.raises(DataError, match=message) as caught:
        learn(tokenizer, [chat("hi", "<think>so</think>\n\nthus", "", "d", system="s")], tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}: row 0: ")


def test_the_row_at_fault_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = THINKING
    with pytest.raises(DataError, match=r"row 600: the chat template leaves out the thought of message 1"):
        learn(tokenizer, [chat("a", "b")] * 600 + [chat("a", "so</think>b")], tmp_path)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template, which `type: chat_template` needs"):
        learn(tokenizer, [chat("a", "b")], tmp_path)


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")], ids=["plain", "marked"])
def test_a_role_that_the_template_leaves_out_is_an_error_that_names_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, marks: tuple[str, str]
) -> None:
    begin, end = marks
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}<|im_start|>user\n{{ message.content }}<|im_end|>"
        "{% elif message.role == 'assistant' %}<|im_start|>assistant\n"
        f"{begin}{{{{ message.content }}}}<|im_end|>{end}{{% endif %}}{{% endfor %}}"
    )
    row = {"messages": [*chat("a", "b")["messages"], {"role": "critic", "content": "bad"}]}
    with pytest.raises(
        DataError, match=r"row 1: message 2 has the role 'critic', which neither .*roles are: user, assis"
    ):
        learn(tokenizer, [chat("a", "b"), row], tmp_path)
    assert len(learn(tokenizer, [chat("a", "b"), row] * 5, tmp_path, on_bad_row="skip").train) == 5
    named = {"path": str(tmp_path / "rows.jsonl"), "type": "chat_template", "roles": {"assistant": ["critic"]}}
    store = prepare_documents(DataSection.model_validate({"datasets": [named]}), tokenizer, seed=0).train
    assert trained_texts(tokenizer, *store.document(1)) == ["b<|im_end|>", "bad<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "column 'messages' holds nothing, but must be a list of messages"),
        ([], "column 'messages' holds an empty list"),
        ("hi", "column 'messages' holds str 'hi'"),
        ([{"role": "user", "content": None}], "message 0 of column 'messages' must have text in 'role' and 'content'"),
        (
            [{"from": "human", "value": "a"}],
            "message 0 of column 'messages' must have text in 'role' and 'content'; "
            "it is {'from': 'human', 'value': 'a'}.\n"
            "Write `message_property_mappings: {role: from, content: value}` beside `field_messages`",
        ),
        (["hi"], "message 0 of column 'messages' must have text"),
    ],
)
def test_messages_of_another_shape_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, messages: Any, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        learn(tokenizer, [{"messages": messages}], tmp_path)
    assert f"row 0: {message}" in str(caught.value)


# --- real rows ---


def test_real_alpaca_rows_are_learned_to_the_letter(tokenizer: PreTrainedTokenizerBase) -> None:
    path = real_file("alpaca_en_demo.json")
    section = DataSection.model_validate({"datasets": [{"path": str(path), "type": "alpaca"}], "sequence_len": 100_000})
    store = prepare_documents(section, tokenizer, seed=0).train
    rows = json.loads(path.read_text())
    assert len(store) == len(rows)
    for i, row in enumerate(rows):
        assert trained_texts(tokenizer, *store.document(i)) == [row["output"] + EOS]


def test_real_conversations_are_learned_to_the_letter(tokenizer: PreTrainedTokenizerBase) -> None:
    path = real_file("kto_en_demo.json")
    entry = {"path": str(path), "type": "chat_template", "unused_columns": ["label"]}
    store = prepare_documents(
        DataSection.model_validate({"datasets": [entry], "sequence_len": 100_000}), tokenizer, seed=0
    ).train
    rows = json.loads(path.read_text())
    assert len(store) == len(rows)
    for i, row in enumerate(rows):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert trained_texts(tokenizer, *store.document(i)) == [answer + "<|im_end|>" for answer in answers]


def test_every_row_type_has_its_file_its_renderer_and_its_keys() -> None:
    files = {path.stem for path in (ROOT / "finetuner/data/formats").glob("*.py")} - {"__init__", "base"}
    assert files == {*ROW_TYPES, "instruction"}
    assert all(callable(load_format(name)) for name in files)
    assert set(KEYS_OF_TYPE) < set(DatasetEntry.model_fields)
    for name, row_type in ROW_TYPES.items():
        assert row_type.column_key is None or row_type.column_key in row_type.keys
        assert DatasetEntry(path="x", type=name).required_columns, name


def test_rows_are_prepared_again_when_the_file_of_a_format_changes(tmp_path: Path) -> None:
    code = tmp_path / "data"
    shutil.copytree(ROOT / "finetuner/data", code)
    before = _code_facts(code)
    assert before == _code_facts()
    with (code / "formats" / "alpaca.py").open("a") as file:
        file.write("# another prompt\n")
    assert _code_facts(code)[0] != before[0] and _code_facts(code)[1:] == before[1:]
