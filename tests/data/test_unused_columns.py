"""What a row says beside what its type reads is read, inert by name, or refused by name: never dropped in silence."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rendering import make_maker, refusal_of, render_row, render_with, trained_parts
from support.rows import write_rows
from support.templates import EOS, chat, learn, real_file, trained_texts
from support.tiny import CHATML
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.chat_templates import TEMPLATES
from finetuner.data.documents import DocumentMaker
from finetuner.data.inert_names import is_inert
from finetuner.data.row_stream import RowStream
from finetuner.data.sources import SourceRow, load_source
from finetuner.errors import DataError, RecipeError
from finetuner.recipe import load_recipe
from finetuner.recipe.sections import DataSection

BLOCK = {"field_instruction": "question", "field_output": "answer"}
TOOL = {"name": "look_up", "description": "Looks a word up.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES["qwen3"]
    return tokenizer


# --- columns of chats ---


def test_a_system_column_stands_before_the_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    own = render_row(tokenizer, {**chat("a", "b"), "system": "Be brief."})
    assert own.text == render_row(tokenizer, chat("a", "b", system="Be brief.")).text
    assert own.roles == ("system", "user", "assistant")
    assert trained_parts(own) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    named = render_row(tokenizer, {**chat("a", "b"), "about": "Be brief."}, field_system="about")
    assert named.text == own.text
    same = render_row(tokenizer, {**chat("a", "b", system="Be brief."), "system": "Be brief.\n"})
    assert same.text == own.text, "the same text is not written twice"
    for empty in (None, "", "  "):
        assert (
            render_row(tokenizer, {**chat("a", "b"), "system": empty}).text
            == render_row(tokenizer, chat("a", "b")).text
        )
    message = refusal_of(tokenizer, {**chat("a", "b", system="Be long."), "system": "Be brief."})
    assert "begin with another system text: 'Be long.'" in message
    without = render_row(tokenizer, {**chat("a", "b"), "system": "Be brief."}, unused_columns=["system"])
    assert without.text == render_row(tokenizer, chat("a", "b")).text and without.ignored == ("system",)


def test_a_column_of_another_name_for_a_system_text_says_the_key(tokenizer: PreTrainedTokenizerBase) -> None:
    message = refusal_of(tokenizer, {**chat("a", "b"), "system_prompt": "Be brief."})
    assert "column 'system_prompt' is not used by `type: chat_template`" in message
    assert "`field_system: system_prompt`" in message and "`unused_columns: [system_prompt]`" in message


def test_functions_are_tools_in_openais_older_form(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("a", "b")
    tools = [{"type": "function", "function": TOOL}]
    expected = render_row(tokenizer, {**row, "tools": tools})
    assert "look_up" in expected.text
    for column in ({"functions": [TOOL]}, {"tools": [TOOL]}, {"tools": tools, "functions": [TOOL]}):
        assert render_row(tokenizer, {**row, **column}).text == expected.text
    flat = {"tools": [{"type": "function", **TOOL}]}
    assert render_row(tokenizer, {**row, **flat}).text == expected.text
    other = {"tools": tools, "functions": [{**TOOL, "name": "other"}]}
    assert "'tools' and 'functions' hold different tools" in refusal_of(tokenizer, {**row, **other})


@pytest.mark.parametrize("column", ["images", "image", "videos", "audios", "image_path", "video_url"])
def test_pictures_videos_and_sound_are_refused_by_name(tokenizer: PreTrainedTokenizerBase, column: str) -> None:
    row = {**chat("<image>Who is this?", "b"), column: ["1.jpg"]}
    message = refusal_of(tokenizer, row)
    assert f"'{column}'" in message and "cannot be trained on yet" in message
    assert render_row(tokenizer, {**chat("a", "b"), column: []}).ignored == ()


@pytest.mark.parametrize(
    "text", ["<image>Who?", "<image>\nWho?", "Who?\n<image>", " <video> What?", "<audio>", "<image_1>a"]
)
def test_a_placeholder_at_either_end_of_a_question_is_no_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    message = refusal_of(tokenizer, chat(text, "b"))
    assert "message 0 has <" in message and 'unused_columns: ["<' in message
    assert "column 'instruction' has <" in refusal_of(tokenizer, {"instruction": text, "output": "b"}, "alpaca")
    assert render_row(tokenizer, chat(text, "b"), unused_columns="ignore").text.count(text.strip()) == 1
    found = text[text.index("<") : text.index(">") + 1]
    assert text.strip() in render_row(tokenizer, chat(text, "b"), unused_columns=[found]).text


def test_a_tag_within_a_text_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("What does <image> do in SVG?", '<video controls src="a.mp4">', "<p>a</p>"):
        assert text in render_row(tokenizer, chat(text, "<image>")).text


@pytest.mark.parametrize(
    ("column", "value", "hint"),
    [
        ("chosen", [{"role": "assistant", "content": "x"}], "preference learning"),
        ("rejected", "no", "preference learning"),
        ("kto_tag", True, "preference learning"),
        ("label", False, "preference learning"),
        ("thought", "It is easy.", "as `reasoning_content`"),
        ("available_tools", [TOOL], "`field_tools: available_tools`"),
        ("documents", [{"title": "t", "text": "x"}], ""),
        ("context", "The sky was green.", ""),
        ("sample_weight", 0.5, ""),
        ("persona", "a pirate", ""),
    ],
)
def test_columns_with_a_meaning_are_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, column: str, value: Any, hint: str
) -> None:
    message = refusal_of(tokenizer, {**chat("a", "b"), column: value})
    assert f"column '{column}' is not used by `type: chat_template`" in message
    assert hint in message and f"`unused_columns: [{column}]`" in message
    for choice in ("ignore", [column]):
        assert render_row(tokenizer, {**chat("a", "b"), column: value}, unused_columns=choice).ignored == (column,)


def test_all_columns_at_fault_are_in_one_message(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"id": 1, **chat("a", "b"), "solution": "s", "odd words": "t", "answer": None}
    message = refusal_of(tokenizer, row)
    assert "columns 'solution', 'odd words' are not used" in message
    assert '`unused_columns: [solution, "odd words"]`' in message


def test_public_sets_with_a_copy_of_the_question_are_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "Hi there", "prompt_id": "f00", "category": "Chat", **chat("Hi there", "Hello")}
    assert render_row(tokenizer, row).ignored == ("prompt_id", "category", "prompt")
    assert "'prompt'" in refusal_of(tokenizer, {**row, "prompt": "Something else"})


@pytest.mark.parametrize(
    "name",
    ["id", "ID", "uuid", "prompt_id", "conversationId", "createdAt", "updated_at", "timestamp", "metadata", "meta",
     "source", "data_source", "url", "avatarUrl", "language", "dataset", "split", "score", "license", "category",
     "model", "model_name", "num_tokens", "token_count", "conversation_hash", "__index_level_0__", "Unnamed: 0", ""],
)  # fmt: skip
def test_ids_dates_sources_and_counts_are_inert(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    assert is_inert(name)
    plain = render_row(tokenizer, chat("a", "b"))
    assert render_row(tokenizer, {**chat("a", "b"), name: "x 1"}) == render_row(
        tokenizer, {name: "x 1", **chat("a", "b")}
    )
    one = render_row(tokenizer, {**chat("a", "b"), name: "x 1"})
    assert (one.text, one.spans, one.ignored) == (plain.text, plain.spans, (name,))


@pytest.mark.parametrize(
    "name",
    ["system", "history", "images", "image_url", "input", "output", "tools", "thought", "reasoning", "weight",
     "context", "chosen", "label", "prompt", "instruction", "text", "function_name", "loss_mask", "completion_mask",
     "position_ids"],
)  # fmt: skip
def test_names_with_a_meaning_are_not_inert(name: str) -> None:
    assert not is_inert(name)


def test_a_rows_own_template_values_are_the_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("a", "b")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{{ tone | default('') }}" + CHATML
    with_tone = render_row(tokenizer, {**row, "chat_template_kwargs": {"tone": "warm"}})
    assert with_tone.text == "warm" + render_row(tokenizer, row).text
    assert render_row(tokenizer, {**row, "chat_template_kwargs": '{"tone": "warm"}'}).text == with_tone.text
    recipe = {"chat_template_kwargs": {"tone": "cold"}}
    assert render_row(tokenizer, row, data=recipe).text.startswith("cold")
    assert render_row(tokenizer, {**row, "chat_template_kwargs": {"tone": "warm"}}, data=recipe).text == with_tone.text
    unknown = render_row(tokenizer, {**row, "chat_template_kwargs": {"mood": 1, "tone": None}})
    assert unknown.ignored == ("chat_template_kwargs.mood",)
    assert "'add_generation_prompt'" in refusal_of(
        tokenizer, {**row, "chat_template_kwargs": {"add_generation_prompt": 1}}
    )


# --- alpaca, blocks, texts, segments, tokens ---


def test_alpacas_system_and_history_are_in_the_prompt_and_not_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {
        "instruction": "And its capital?", "input": "", "output": "Lima.", "system": "You answer as a pirate.",
        "history": [["Which country has Machu Picchu?", "Peru."], ["Is it old?", "Yes."]],
    }  # fmt: skip
    one = render_row(tokenizer, row, "alpaca")
    assert one.text == (
        "You answer as a pirate.\n\n"
        f"### Instruction:\nWhich country has Machu Picchu?\n\n### Response:\nPeru.{EOS}\n\n"
        f"### Instruction:\nIs it old?\n\n### Response:\nYes.{EOS}\n\n"
        "### Instruction:\nAnd its capital?\n\n### Response:\nLima."
    )
    assert trained_parts(one) == ["Lima."]
    texts = [one.text[start:stop] for start, stop in one.contents]
    assert texts == [row["system"], *[text for turn in row["history"] for text in turn], row["instruction"], "Lima."]
    plain = {"instruction": "a", "input": "i", "output": "o"}
    for empty in ({"system": "", "history": []}, {"system": None, "history": None}, {"system": " ", "history": ""}):
        assert render_row(tokenizer, {**plain, **empty}, "alpaca") == render_row(tokenizer, plain, "alpaca")
    assert "Below is an instruction" in render_row(tokenizer, {**plain, "history": [["q", "r"]]}, "alpaca").text
    assert "must be a list of [question, answer]" in refusal_of(tokenizer, {**plain, "history": [["q"]]}, "alpaca")


def test_rows_with_another_name_for_the_output_get_a_block_to_paste(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"instruction": f"Name river {i}.", "input": "", "response": f"River {i}."} for i in range(3)]
    with pytest.raises(DataError, match="no column 'output'") as caught:
        learn(tokenizer, rows, tmp_path)
    start = str(caught.value).index("    type: {")
    pasted = tmp_path / "recipe.yml"
    pasted.write_text(
        f"base_model: {tokenizer.name_or_path}\nlearning_rate: 1e-4\nmax_steps: 1\noutput_dir: {tmp_path / 'out'}\n"
        f"datasets:\n  - path: {tmp_path / 'rows.jsonl'}\n{str(caught.value)[start:]}\n"
    )
    entry = load_recipe(pasted, check_files=False).data.datasets[0]
    given = render_row(tokenizer, rows[0], entry.type.model_dump())
    expected = render_row(tokenizer, {"instruction": rows[0]["instruction"], "output": rows[0]["response"]}, "alpaca")
    assert (given.text, given.spans) == (expected.text, expected.spans)


def test_one_column_is_not_written_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    block = {"field_instruction": "input", "field_output": "output"}
    assert render_row(tokenizer, {"input": "What is 0+1?", "output": "1"}, block).text == "What is 0+1? 1"
    answer = {"field_instruction": "question", "field_output": "input"}
    assert render_row(tokenizer, {"question": "q", "input": "a"}, answer).text == "q a"


@pytest.mark.parametrize(
    "block",
    [
        {"field_instruction": "question", "field_input": "question", "field_output": "answer"},
        {"field_instruction": "answer", "field_output": "answer"},
        {"field_input": "instruction"},
        {"field_system": "output"},
    ],
)
def test_a_recipe_that_names_a_column_twice_is_refused(tmp_path: Path, block: dict[str, str]) -> None:
    recipe = tmp_path / "recipe.yml"
    lines = "".join(f"      {key}: {value}\n" for key, value in block.items())
    recipe.write_text(
        "base_model: x\nlearning_rate: 1e-4\nmax_steps: 1\noutput_dir: out\n"
        f"datasets:\n  - path: x.jsonl\n    type:\n{lines}"
    )
    with pytest.raises(RecipeError, match="would stand there twice"):
        load_recipe(recipe, check_files=False)


def test_an_input_that_the_format_has_no_place_for_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    block = {**BLOCK, "format": "{instruction}\n", "no_input_format": "{instruction}\n"}
    row = {"question": "q", "answer": "a", "input": "Given text."}
    assert "the format has no {input}" in refusal_of(tokenizer, row, block)
    assert render_row(tokenizer, row, block, unused_columns=["input"]).text == "q\na"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "q", "answer": "a"}, BLOCK),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"text": "q"}, "completion"),
        ({"segments": [{"text": "q", "label": True}]}, "input_output"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"messages": chat("q", "a")["messages"]}, "chat_template"),
    ],
)
def test_every_type_refuses_what_it_does_not_use(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], kind: Any
) -> None:
    plain = render_row(tokenizer, row, kind)
    assert "column 'comment' is not used by" in refusal_of(tokenizer, {**row, "comment": "Mind the gap."}, kind)
    one = render_row(tokenizer, {**row, "comment": "Mind the gap.", "id": 3}, kind, unused_columns=["comment"])
    assert (one.text, one.spans, set(one.ignored)) == (plain.text, plain.spans, {"comment", "id"})
    left = render_row(tokenizer, {**row, "weight": 0}, kind)
    assert (left.text, left.spans) == (plain.text, ()), "a row that says so is not trained on"
    assert render_row(tokenizer, {**row, "weight": 1.0}, kind) == plain
    assert "'weight' is 0.5" in refusal_of(tokenizer, {**row, "weight": 0.5}, kind)


def test_further_keys_of_segments_and_parts_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    segment = {"text": "q", "label": True, "weight": 0.5}
    assert "segment 0 has 'weight'" in refusal_of(tokenizer, {"segments": [segment]}, "input_output")
    part = {"type": "text", "text": "a", "translation": "b"}
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "c"}]}
    assert "has 'translation'" in refusal_of(tokenizer, row)
    assert "'image_url', and pictures" in refusal_of(
        tokenizer, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    )


def test_rows_of_tokens_refuse_what_they_do_not_use(tokenizer: PreTrainedTokenizerBase) -> None:
    section = DataSection.model_validate({"datasets": [{"path": "x.jsonl"}], "sequence_len": 64})
    maker = DocumentMaker(section.datasets[0], section, tokenizer)
    row = {
        "input_ids": [5, 6, 7],
        "labels": [5, 6, 7],
        "attention_mask": [1, 1, 1],
        "length": 3,
        "token_type_ids": [0] * 3,
    }
    for fine in (row, {**row, "position_ids": [0, 1, 2]}):
        assert len(maker.make([SourceRow(fine, "x", 0)]).documents[0]) == 1
    for more in ({"position_ids": [0, 1, 0]}, {"completion_mask": [0, 1, 1]}, {"loss_mask": [0, 1, 1]}):
        with pytest.raises(DataError, match=next(iter(more))):
            maker.make([SourceRow({**row, **more}, "x", 0)])


def test_rows_of_a_stream_are_held_to_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**chat("a", "b"), "id": 1}, {**chat("a", "b"), "persona": "a pirate"}])
    entry = {"path": str(path), "type": "chat_template"}
    values = {"datasets": [entry], "sequence_len": 64, "streaming": True, "streaming_multipack_buffer_size": 2}
    with pytest.raises(DataError, match="row 1: column 'persona' is not used"):
        RowStream(DataSection.model_validate(values), tokenizer, 5, packing=False).rows(0, 1)
    entry["unused_columns"] = "ignore"
    assert RowStream(DataSection.model_validate(values), tokenizer, 5, packing=False).rows(0, 1).length(0) > 0


def test_unused_columns_may_not_name_what_the_rows_are_read_from(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "base_model: x\nlearning_rate: 1e-4\nmax_steps: 1\noutput_dir: out\n"
        "datasets:\n  - {path: x.jsonl, type: alpaca, unused_columns: [output]}\n"
    )
    with pytest.raises(RecipeError, match="'output' is what the rows are read from"):
        load_recipe(recipe, check_files=False)


# --- real rows ---


@pytest.mark.parametrize(
    ("name", "keys", "refused"),
    [
        ("alpaca_en_demo.json", {"type": "alpaca"}, None),
        ("c4_demo.jsonl", {"type": "completion"}, None),
        ("reason_tool_use_demo_50.jsonl", {"type": "chat_template"}, None),
        ("kto_en_demo.json", {"type": "chat_template"}, "preference learning"),
        ("gsm8k_train.jsonl", {"type": BLOCK}, None),
        ("squad_for_llms.jsonl", {"type": {**BLOCK, "field_output": "output", "field_input": "context"}}, None),
        ("squad_for_llms.jsonl", {"type": {**BLOCK, "field_output": "output"}}, "'context' is not used"),
    ],
)
def test_real_rows_of_the_right_type_pass(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, keys: dict[str, Any], refused: str | None
) -> None:
    entry = {"path": str(real_file(name)), "max_samples": 200, **keys}
    section = DataSection.model_validate({"datasets": [entry], "sequence_len": 100_000})
    rows = next(iter(load_source(section.datasets[0], tmp_path).batches(200)))
    maker = DocumentMaker(section.datasets[0], section, tokenizer)
    if refused is None:
        assert all(text is not None for text in maker.render(rows).texts)
        return
    with pytest.raises(DataError, match=refused):
        maker.render(rows)


# --- any row ---

NAMES = st.sampled_from(
    ["id", "meta", "created_at", "system", "history", "tools", "functions", "images", "input", "thought", "reasoning",
     "weight", "train", "loss_mask", "label", "chosen", "context", "prompt", "name", "source", "text", "comment",
     "chat_template_kwargs", "response", "documents", "video", "score", "turns", "function_call", "tool_calls",
     "reasoning_content", "thinking", "tool_call_id", "recipient", "channel"],
) | st.text("abcxyz_", min_size=1, max_size=8)  # fmt: skip
VALUES = st.sampled_from(
    [None, "", [], {}, "A text of its own that stands nowhere else.", "q", 0, 1, 0.5, True, False, ["x"], [["q", "r"]],
     {"a": 1}, {"a": None}, [TOOL], [{"role": "user", "content": "x"}], "<image>", {"name": "f", "arguments": {}}]
)  # fmt: skip
ROWS: list[tuple[dict[str, Any], Any]] = [
    ({"question": "q", "answer": "a"}, BLOCK),
    ({"instruction": "q", "output": "a"}, "alpaca"),
    ({"text": "q"}, "completion"),
    ({"prompt": "q", "completion": "a"}, "prompt_completion"),
    ({"prompt": chat("q")["messages"], "completion": [{"role": "assistant", "content": "a"}]}, "prompt_completion"),
    (chat("q", "a", "r", "b"), "chat_template"),
]


def _is_said(plain: Any, other: Any, name: str, value: Any) -> bool:
    """Whether a further cell was read, ignored by name, or says nothing."""
    same = (plain.text, plain.spans) == (other.text, other.spans)
    says_nothing = value in (None, "", [], {}, {"a": None}) or (name in FLAG_NAMES and value == 1)
    return not same or name in other.ignored or f"messages[].{name}" in other.ignored or says_nothing


FLAG_NAMES = ("weight", "train", "loss_mask")


@settings(deadline=None, max_examples=400, derandomize=True)
@given(which=st.integers(0, len(ROWS) - 1), name=NAMES, value=VALUES)
def test_a_further_column_is_read_or_ignored_by_name_or_refused(
    tokenizer: PreTrainedTokenizerBase, which: int, name: str, value: Any
) -> None:
    row, _ = ROWS[which]
    if name in row:
        return
    maker = _maker(tokenizer, which)
    plain = render_with(maker, row)
    try:
        other = render_with(maker, {**row, name: value})
    except DataError as error:
        assert name in str(error) or "<image>" in str(error)
        return
    if name == "chat_template_kwargs":
        assert all(f"{name}.{key}" in other.ignored for key in value or () if value[key] is not None)
        return
    assert _is_said(plain, other, name, value)


@settings(deadline=None, max_examples=400, derandomize=True)
@given(name=NAMES, value=VALUES, turn=st.integers(0, 3), template=st.sampled_from(["chatml", "qwen3", "llama3"]))
def test_a_further_key_of_a_message_is_read_or_ignored_by_name_or_refused(
    tokenizer_folder: Path, name: str, value: Any, turn: int, template: str
) -> None:
    maker = _maker_of_template(tokenizer_folder, template)
    row = chat("q", "a", "r", "b")
    plain = render_with(maker, row)
    row["messages"][turn][name] = value
    try:
        other = render_with(maker, row)
    except DataError as error:
        assert name in str(error) or "chat template" in str(error) or "tool call" in str(error)
        return
    is_role_flag = name in FLAG_NAMES and bool(value) == (turn % 2 == 1)  # what its role says in any case
    assert is_role_flag or _is_said(plain, other, name, value)


_MAKERS: dict[Any, DocumentMaker] = {}  # making one for each example would take minutes


def _maker(tokenizer: PreTrainedTokenizerBase, which: int) -> DocumentMaker:
    if which not in _MAKERS:
        _MAKERS[which] = make_maker(tokenizer, ROWS[which][1])
    return _MAKERS[which]


def _maker_of_template(folder: Path, name: str) -> DocumentMaker:
    if name not in _MAKERS:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]}, replace_extra_special_tokens=False)
        tokenizer.chat_template = CHATML if name == "chatml" else TEMPLATES[name]
        _MAKERS[name] = make_maker(tokenizer, "chat_template")
    return _MAKERS[name]


def test_documents_of_rows_with_inert_columns_are_those_without(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{**chat("a", "b"), "id": i, "meta": {"n": i}} for i in range(3)]
    store = learn(tokenizer, rows, tmp_path).train
    assert [trained_texts(tokenizer, *store.document(i)) for i in range(3)] == [
        ["<think>\n\n</think>\n\nb<|im_end|>"]
    ] * 3


def test_a_call_keeps_its_name_and_id_where_other_names_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"q": "x"}}, "detail": "x"}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
    assert "'detail'" in refusal_of(tokenizer, row)
    for unused in ("ignore", ["detail", "name"]):
        assert '"name": "look"' in render_row(tokenizer, row, unused_columns=unused).text
