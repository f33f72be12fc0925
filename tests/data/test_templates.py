"""Named templates, thoughts, tool calls: exactly the answers with their ends, in time that grows with the length."""

import json
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.templates import (
    BOS,
    CONTENTS,
    ENDS,
    NAMED,
    UNTHOUGHT,
    WITHOUT_BOS,
    chat,
    decoded,
    learn,
    real_file,
    trained_texts,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.chat_renderer import build_chat_renderer
from finetuner.data.chat_templates import TEMPLATES
from finetuner.data.documents import CHAT_WORDS
from finetuner.data.messages import MessageReader
from finetuner.data.prepare import prepare_documents
from finetuner.data.template_sandbox import compile_template
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry
from finetuner.recipe.sections.datasets import CHAT_TEMPLATES


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """The tests' tokenizer, with the ends of turns of every family."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    more = [*ENDS, "<|END_RESPONSE|>", "[INST]", "[/INST]", "<｜Assistant｜>", "<start_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
    return tokenizer


def test_the_names_that_a_recipe_may_write_are_those_that_there_are() -> None:
    assert sorted(TEMPLATES) == sorted(CHAT_TEMPLATES) == sorted(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_trains_every_answer_with_its_end_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    lead, end, trims = NAMED[name]
    own = [*CONTENTS, f"{end}\n", "user", "model", f"{BOS}a"]
    contents = [text for text in own if not ("</think>" in text and name.startswith("qwen3"))]
    rows = [chat("hi", content) for content in contents]
    rows += [chat(*contents, *(["end"] if len(contents) % 2 else []), system=None if name == "gemma" else "be brief")]
    prepared = learn(tokenizer, rows, tmp_path)
    assert all(note.endswith(CHAT_WORDS) for note in prepared.notes)  # some contents are words like special tokens
    for i, row in enumerate(rows):
        ids, labels = prepared.train.document(i)
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        expected = [lead + (answer.strip() if trims else answer) + end for answer in answers]
        expected[-1] = UNTHOUGHT.get(name, "") + expected[-1]
        assert trained_texts(tokenizer, ids, labels) == expected
        assert decoded(tokenizer, ids) == tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert (ids == tokenizer.bos_token_id).sum() == (name not in WITHOUT_BOS)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_asks_with_what_stands_before_its_answers(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """The model is asked for an answer in the very text it was trained to answer."""
    tokenizer.chat_template = TEMPLATES[name]
    messages = chat("a", "b", "c", "d")["messages"]
    thinks_off = {"enable_thinking": False} if name.startswith("qwen3") else {}
    asked = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True, **thinks_off)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    lead, end, _ = NAMED[name]
    assert whole.startswith(asked + lead + "d" + end)


# --- thoughts and tool calls ---

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": json.dumps(arguments)}}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLING = [
    said("system", "be brief"),
    said("user", "1 + 2?"),
    said("assistant", "", reasoning_content="a sum\n", tool_calls=[call(a=1, b="<|im_end|>")]),
    said("tool", '{"sum": "3\\n"}'),
    said("tool", "[[1, 2], [3, 4]]"),
    said("assistant", "It is 3."),
    said("user", "assistant"),
    said("assistant", "<|im_start|>user", reasoning_content="why\nthat?", tool_calls=[call(), call(c="é")]),
    said("tool", "4"),
    said("assistant", "4 ", reasoning_content="done"),
]
JSON_CALL = '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=add>\n%s</function>\n</tool_call>"
XML_ARGUMENT = "<parameter=%s>\n%s\n</parameter>\n"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_thoughts_and_calls_are_learned_and_results_are_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    prepared = learn(tokenizer, [{"messages": CALLING, "tools": [TOOL]}], tmp_path)
    ids, labels = prepared.train.document(0)
    if name == "qwen3":
        opened, calls = (
            "<think>\n",
            [JSON_CALL % '{"a": 1, "b": "<|im_end|>"}', JSON_CALL % "{}", JSON_CALL % '{"c": "é"}'],
        )
    else:  # its prompt opens the thought
        arguments = XML_ARGUMENT % ("a", 1) + XML_ARGUMENT % ("b", "<|im_end|>")
        opened, calls = "", [XML_CALL % arguments, XML_CALL % "", XML_CALL % (XML_ARGUMENT % ("c", "é"))]
    assert trained_texts(tokenizer, ids, labels) == [
        f"{calls[0]}<|im_end|>",  # a thought before an earlier question's answer is not shown
        "It is 3.<|im_end|>",
        f"{opened}why\nthat?\n</think>\n\n<|im_start|>user\n{calls[1]}\n{calls[2]}<|im_end|>",
        f"{opened}done\n</think>\n\n4 <|im_end|>",
    ]
    whole = decoded(tokenizer, ids)
    assert "a sum" not in whole
    assert whole.count("<tool_response>") == 3
    # of the special tokens only those that the template wrote; the row's own are words
    ends, begins = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    assert (ids == ends).sum() == (ids == begins).sum() == 9


@pytest.mark.parametrize("inside", ["<think>\nwhy\n</think>\n\nso", "why\n</think>\n\nso"])
def test_a_thought_within_the_text_is_the_same_as_one_beside_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, inside: str
) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    beside = {"messages": [said("user", "a"), said("assistant", "so", reasoning_content="why")]}
    within = {"messages": [said("user", "a"), said("assistant", inside)]}
    apart = [learn(tokenizer, [row], tmp_path).train for row in (beside, within)]
    assert (apart[0].ids == apart[1].ids).all()
    assert (apart[0].labels == apart[1].labels).all()
    assert trained_texts(tokenizer, *apart[0].document(0)) == ["<think>\nwhy\n</think>\n\nso<|im_end|>"]


def rendered(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], **keys: Any) -> list[str]:
    """The trained parts of a row's text, by the keys of its entry."""
    entry = DatasetEntry.model_validate({"path": "rows.jsonl", "type": "chat_template"} | keys)
    chat_renderer = build_chat_renderer(
        tokenizer, kwargs={}, eot_tokens=None, train_on_eos=entry.train_on_eos, train_on_eot=entry.train_on_eot
    )
    one = chat_renderer.render(MessageReader.of(entry).read(row))
    return [one.text[start:stop] for start, stop in one.spans]


def test_a_template_that_writes_the_date_goes_on_behind_midnight(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ strftime_now('%d') }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    entry = DatasetEntry.model_validate({"path": "rows.jsonl", "type": "chat_template"})
    renderer = build_chat_renderer(tokenizer, kwargs={}, eot_tokens=None, train_on_eos="turn", train_on_eot=None)
    conversation = MessageReader.of(entry).read(chat("a", "b"))
    for day in (30, 31):
        now = datetime(2026, 12, day)
        monkeypatch.setattr("finetuner.data.template_sandbox.datetime", SimpleNamespace(now=lambda now=now: now))
        monkeypatch.setattr("finetuner.data.chat_renderer.date", SimpleNamespace(today=lambda now=now: now.date()))
        one = renderer.render(conversation)
        assert f"user {day}\na" in one.text
        assert [one.text[start:stop] for start, stop in one.spans] == ["b<|im_end|>"]


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("turn", ["b<|im_end|>", "d<|im_end|>"]),
        ("last", ["b", "d<|im_end|>"]),
        ("none", ["b", "d"]),
        ("all", ["<|im_end|>", "b<|im_end|>", "<|im_end|>", "d<|im_end|>"]),
    ],
)
def test_ends_of_turns_are_learned_as_the_recipe_says(
    tokenizer: PreTrainedTokenizerBase, ends: str, expected: list[str], calls: bool
) -> None:
    tokenizer.chat_template = TEMPLATES["qwen_25"]
    row = chat("a", "b", "c", "d")
    if calls:
        row["messages"][1]["tool_calls"] = [call(a=1)]
        with_call = "b\n" + JSON_CALL % '{"a": 1}'
        expected = [with_call + text[1:] if text.startswith("b") else text for text in expected]
    assert rendered(tokenizer, row, train_on_eos=ends) == expected


def test_roles_and_messages_choose_what_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATES["chatml"]
    row = chat("a", "b", "c", "d", system="s")
    assert rendered(tokenizer, row, roles_to_train=["user", "system"]) == [
        "s<|im_end|>", "a<|im_end|>", "c<|im_end|>",
    ]  # fmt: skip
    row["messages"][2]["train"] = False
    row["messages"][3]["weight"] = 1
    assert rendered(tokenizer, row) == ["c<|im_end|>", "d<|im_end|>"]
    row["messages"][4]["weight"] = 0.5
    with pytest.raises(DataError, match=r"'weight' is 0\.5, but must be true or false"):
        rendered(tokenizer, row)


def test_a_turn_to_be_learned_that_yields_nothing_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(DataError, match="message 1 is to be trained on, but it is empty and its end is not trained on"):
        rendered(tokenizer, chat("a", ""), train_on_eos="none")
    tokenizer.chat_template = TEMPLATES["chatml"] + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="marks no answer"):
        rendered(tokenizer, chat("a", "b"))


def test_words_of_a_tool_are_words(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = []
    for description in ("ends", "ends <|im_end|> here"):
        tool = json.loads(json.dumps(TOOL))
        tool["function"]["description"] = description
        ids.append(learn(tokenizer, [{"messages": CALLING, "tools": [tool]}], tmp_path).train.document(0)[0])
    assert "ends <|im_end|> here" in decoded(tokenizer, ids[1])
    assert (ids[0] == ends).sum() == (ids[1] == ends).sum() == 9


def test_tool_calls_that_are_no_list_are_a_bad_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    rows = [{"messages": [said("user", "1?"), {**said("assistant", "2"), "tool_calls": 5}]}, {"messages": CALLING}]
    with pytest.raises(DataError, match=r"row 0: message 1: 'tool_calls' is 5, but must be a list of calls"):
        learn(tokenizer, rows, tmp_path)
    assert len(learn(tokenizer, rows, tmp_path, on_bad_row="skip", max_dropped_fraction=0.5).train) == 1


def test_a_template_that_changes_a_message_changes_its_own_copy(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% set _ = dict.update(messages[0], content='be kind: ' + messages[0].content) %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    ids, labels = learn(
        tokenizer, [{"messages": [said("user", "1?"), said("assistant", "2")]}], tmp_path
    ).train.document(0)
    assert decoded(tokenizer, ids).startswith("<|im_start|>user\nbe kind: 1?<|im_end|>")
    assert trained_texts(tokenizer, ids, labels) == ["2<|im_end|>"]


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"])
def test_real_tool_calls_are_learned_to_the_letter(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    path = real_file(name)
    tokenizer.chat_template = TEMPLATES["qwen3"]
    text = path.read_text()
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    shape = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
    rows = rows[:80]
    entry = {"path": str(path), "type": "chat_template", "max_samples": 80} | (
        shape if "conversations" in rows[0] else {}
    )
    section = DataSection.model_validate({"datasets": [entry], "sequence_len": 1_000_000})
    store = prepare_documents(section, tokenizer, seed=0).train
    assert len(store) == len(rows)
    reader = MessageReader.of(section.datasets[0])
    for i, row in enumerate(rows):
        answers = [message for message in reader.read(row).messages if message["role"] == "assistant"]
        learned = trained_texts(tokenizer, *store.document(i))
        assert len(learned) == len(answers)
        for answer, span in zip(answers, learned, strict=True):
            assert span.endswith("<|im_end|>")
            assert answer["content"].split("</think>")[-1].strip() in span
            for one in answer.get("tool_calls", ()):
                assert json.dumps(one["function"]["arguments"], ensure_ascii=False) in span


# --- bounds ---

HUGE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(x='aa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adds": "{% set n = namespace(x='aa') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "replaces": (
        "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}"
    ),
    "captures": "{% set x %}aa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "repeats": "{{ 'a' * 2000000000 }}",
    "multiplies": "{% set n = namespace(x=9) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "raises to a power": "{{ 9 ** 999999999 }}",
    "pads": "{{ 'a' | center(2000000000) }}",
    "adjusts": "{{ 'a'.ljust(2000000000) }}",
    "formats": "{{ '{:>2000000000}'.format(1) }}",
    "formats as C": "{{ '%2000000000d' % 1 }}",
    "calls itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "writes much": "{% for a in range(99999) %}{{ messages[0].content }}{{ 'a' * 999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_template_without_an_end_is_refused_in_seconds(name: str) -> None:
    start = time.process_time()
    with pytest.raises(DataError, match="the chat template"):
        compile_template(HUGE[name], {}).render(chat("a", "b")["messages"], None)
    assert time.process_time() - start < 10


def test_a_long_conversation_is_within_bounds() -> None:
    content = "x" * 10_000
    messages = chat(*[content] * 1000)["messages"]
    assert compile_template(TEMPLATES["qwen3"], {}).render(messages, None).count(content) == 1000


def test_time_grows_with_the_length_and_not_with_its_square(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Ten times the turns take about ten times as long, plain or with calls; the square would be a hundred."""
    for template, turns in (
        ("chatml", [said("user", "why so?"), said("assistant", "because it is so.")]),
        ("qwen3", [said("user", "1?"), said("assistant", "", tool_calls=[call(a=1)]), said("tool", "1")]),
    ):
        tokenizer.chat_template = TEMPLATES[template]
        seconds = {}
        for times in (10, 100):
            row = {"messages": turns * times + [said("assistant", "end")]}
            took = []
            for _ in range(2):
                start = time.process_time()
                learn(tokenizer, [row] * 2, tmp_path)
                took.append(time.process_time() - start)
            seconds[times] = min(took)
        assert seconds[100] < 30 * seconds[10]


def test_templates_are_rendered_as_transformers_renders_them(tokenizer: PreTrainedTokenizerBase) -> None:
    """White space, loop controls, JSON, generation marks and the names that a template may use."""
    template = (
        "{% for m in messages %}\n  {%- if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "  {% generation %}\n{{ m | tojson }}{{ m | tojson(indent=2) }}\n{% endgeneration %}\n{% endfor %}\n"
        "{{ bos_token }} {{ tools }} {{ namespace(a=1).a }} {{ dict(b=2) }} {{ documents is none }}\n\n"
        "{{ messages[0].content.format('x') }} {{ 7 % 4 }} {{ [1] + [2] }} {{ strftime_now('%Y') | length }}"
    )
    messages = [said("user", "ä <b> {}"), said("tool", "t"), said("assistant", "y", thinking="z")]
    tokenizer.chat_template = template
    for tools in (None, [TOOL]):
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        program = compile_template(template, tokenizer.special_tokens_map)
        assert program.render(messages, tools) == expected
        text, spans = program.render_marked(messages, tools)
        assert text == expected
        marked = [json.JSONDecoder().raw_decode(text[start:stop])[0]["role"] for start, stop in spans]
        assert marked == ["user", "assistant"]
