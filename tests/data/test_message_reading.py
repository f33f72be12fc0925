"""Messages in other tools' words: who speaks, what is trained on, calls, thoughts, lists of messages in two columns."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rendering import SHAREGPT, make_maker, refusal_of, render_row, render_with, trained_parts
from support.rows import write_rows
from support.templates import chat, learn, trained_texts
from support.tiny import CHATML
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.chat_templates import TEMPLATES
from finetuner.data.roles import ALIASES
from finetuner.errors import DataError

FOUR_ROLES = (
    "{%- for m in messages if m.role in ('system', 'user', 'assistant', 'tool') -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def qwen(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    return tokenizer


# --- roles ---


def test_the_case_of_a_role_does_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = render_row(tokenizer, chat("hi", "hello", system="s"))
    for names in (("System", "User", "Assistant"), ("SYSTEM", "HUMAN", "GPT"), ("system", "Prompter", "ChatBot")):
        row = {
            "conversations": [
                {"from": name, "value": text} for name, text in zip(names, ["s", "hi", "hello"], strict=True)
            ]
        }
        assert render_row(tokenizer, row, **SHAREGPT) == expected


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_other_names_of_a_role_are_that_role(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    row = {"messages": [{"role": name, "content": "a"}, {"role": "assistant", "content": "b"}]}
    expected = {"messages": [{"role": ALIASES[name], "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert render_row(tokenizer, row) == render_row(tokenizer, expected)


def test_developer_is_system_where_the_template_has_no_developer(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [{"role": "developer", "content": "s"}, *chat("a", "b")["messages"]]}
    assert render_row(tokenizer, row).text == render_row(tokenizer, chat("a", "b", system="s")).text
    tokenizer.chat_template = CHATML.replace("{% for", "{% if messages[0].role == 'developer' %}!{% endif %}{% for", 1)
    own = render_row(tokenizer, row)
    assert own.text.startswith("!<|im_start|>developer\ns<|im_end|>") and own.roles[0] == "developer"


def test_function_is_tool_and_never_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FOUR_ROLES
    row = chat("Weather in Oslo?", "get_weather(Oslo)", "3", "3 degrees.")
    row["messages"][2] = {"role": "function", "name": "get_weather", "content": "3"}
    one = render_row(tokenizer, row)
    assert "<|im_start|>tool\n3<|im_end|>" in one.text
    assert trained_parts(one) == ["get_weather(Oslo)<|im_end|>", "3 degrees.<|im_end|>"]
    assert one.ignored == ("messages[].name",)


@pytest.mark.parametrize("name", ["context", "instructor", "critic", "customer", "narrator"])
def test_an_unknown_role_is_refused_with_the_roles_of_its_row(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    row = {"messages": [{"role": name, "content": "x"}, *chat("a", "b")["messages"]]}
    message = refusal_of(tokenizer, row)
    assert f"message 0 has the role '{name}'" in message
    assert f"The row's roles are: {name}, user, assistant." in message
    assert f"`roles: {{user: [{name}]}}`" in message and f"assistant: [{name}]" not in message
    mapped = render_row(tokenizer, row, roles={"user": [name]})
    assert mapped.text.startswith("<|im_start|>user\nx<|im_end|>") and trained_parts(mapped) == ["b<|im_end|>"]
    own = render_row(tokenizer, row, roles={name: [name]})
    assert own.text.startswith(f"<|im_start|>{name}\nx<|im_end|>"), "a recipe may name a role that is its own"


def test_a_recipes_names_go_before_the_usual_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [{"role": "Bot", "content": "a"}, {"role": "human", "content": "b"}]}
    one = render_row(tokenizer, row, roles={"user": ["bot"], "assistant": ["human"]})
    assert one.roles == ("user", "assistant") and trained_parts(one) == ["b<|im_end|>"]


def test_roles_to_train_may_be_in_the_rows_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert trained_parts(render_row(tokenizer, chat("a", "b"), roles_to_train=["human"])) == ["a<|im_end|>"]


# --- what is trained on ---


@pytest.mark.parametrize("key", ["train", "weight", "loss", "loss_mask", "loss_weight", "trainable"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_flags_of_other_tools_are_heeded(tokenizer: PreTrainedTokenizerBase, key: str, no: Any, yes: Any) -> None:
    row = chat("2+2?", "5, a draft.", "Sure?", "4.")
    row["messages"][1][key], row["messages"][3][key] = no, yes
    assert trained_parts(render_row(tokenizer, row)) == ["4.<|im_end|>"]
    row["messages"][0][key] = row["messages"][2][key] = no  # LLaMA-Factory's own demo has it on each
    assert trained_parts(render_row(tokenizer, row)) == ["4.<|im_end|>"]
    assert trained_parts(render_row(tokenizer, row, message_field_training=key)) == ["4.<|im_end|>"]
    row["messages"][1][key] = None
    assert len(trained_parts(render_row(tokenizer, row))) == 2, "null: the role decides"


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", [1], float("nan")])
def test_a_flag_that_weighs_is_refused_with_what_to_write(tokenizer: PreTrainedTokenizerBase, value: Any) -> None:
    row = chat("a", "b")
    row["messages"][1]["loss_weight"] = value
    message = refusal_of(tokenizer, row)
    assert "message 1: 'loss_weight' is" in message and "must be true or false (1 or 0)" in message
    one = render_row(tokenizer, row, unused_columns=["loss_weight"])
    assert trained_parts(one) == ["b<|im_end|>"] and one.ignored == ("messages[].loss_weight",)


def test_two_flags_that_disagree_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("a", "b")
    row["messages"][1] |= {"weight": 1, "loss_mask": 0}
    assert "message 1: 'weight' is true and 'loss_mask' is false" in refusal_of(tokenizer, row)
    row["messages"][1] = {**chat("a", "b")["messages"][1], "learn": True, "train": False}
    assert "'learn' is true and 'train' is false" in refusal_of(tokenizer, row, message_field_training="learn")
    agreed = chat("a", "b")
    agreed["messages"][1] |= {"weight": 1, "loss_mask": 1.0}
    assert trained_parts(render_row(tokenizer, agreed)) == ["b<|im_end|>"]


def test_a_flag_against_train_on_inputs_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    assert "the recipe's train_on_inputs that all is" in refusal_of(tokenizer, row, data={"train_on_inputs": True})


def test_flags_of_a_csv_file_are_words(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output,weight\na,b,1\nc,d,0\ne,f,True\n")
    entry = {"path": str(path), "type": "alpaca"}
    store = learn(tokenizer, [chat("a", "b")], tmp_path, datasets=[entry], max_dropped_fraction=0.5).train
    assert [trained_texts(tokenizer, *store.document(i))[0][0] for i in range(len(store))] == ["b", "f"]


# --- calls, thoughts, nulls ---

CALL = {"name": "search", "arguments": {"q": "cats", "limit": None, "deep": {"a": None}}}
TOOLS = [
    {
        "name": "search",
        "parameters": {"type": "object", "properties": {"limit": {"type": ["integer", "null"], "default": None}}},
    }
]


def call_row(answer: dict[str, Any]) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "Search."},
        {"role": "assistant", **answer},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Done."},
    ]
    return {"messages": messages, "tools": TOOLS}


def test_a_call_is_learned_in_every_form_with_its_nulls(qwen: PreTrainedTokenizerBase) -> None:
    as_text = {**CALL, "arguments": json.dumps(CALL["arguments"])}
    forms: list[dict[str, Any]] = [
        {"content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"content": None, "tool_calls": [{"id": None, "type": "function", "function": as_text}]},
        {"content": None, "tool_calls": [CALL], "function_call": None},
        {"content": "", "function_call": as_text},
        {"content": None, "function_call": CALL, "tool_calls": []},
        {"function_call": json.dumps(CALL)},
        {"content": "", "tool_calls": [{"name": "search", "parameters": CALL["arguments"]}]},
    ]
    texts = {render_row(qwen, call_row(form)).text for form in forms}
    assert len(texts) == 1
    (text,) = texts
    assert '{"name": "search", "arguments": {"q": "cats", "limit": null, "deep": {"a": null}}}' in text
    assert '"default": null' in text
    assert trained_parts(render_row(qwen, call_row(forms[3])))[0].startswith("<tool_call>")


def test_tools_as_text_keep_their_nulls_too(qwen: PreTrainedTokenizerBase) -> None:
    row = call_row({"content": "", "tool_calls": [CALL]})
    assert render_row(qwen, {**row, "tools": json.dumps(TOOLS)}) == render_row(qwen, row)
    assert render_row(qwen, {**row, "tools": [json.dumps(one) for one in TOOLS]}) == render_row(qwen, row)


def test_an_older_call_and_its_function_are_one_conversation(qwen: PreTrainedTokenizerBase) -> None:
    row = call_row({"content": "", "function_call": CALL})
    row["messages"][2] = {"role": "function", "name": "search", "content": "ok"}
    row["functions"] = row.pop("tools")
    expected = render_row(qwen, call_row({"content": "", "tool_calls": [CALL]}))
    one = render_row(qwen, row)
    assert (one.text, one.spans, one.roles) == (
        expected.text,
        expected.spans,
        ("user", "assistant", "tool", "assistant"),
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": "", "function_call": CALL, "tool_calls": [CALL]}, "has 'function_call' and 'tool_calls'"),
        ({"content": "", "function_call": {"arguments": {}}}, "must have a 'name'"),
        ({"content": "", "function_call": 0}, "must have a 'name'"),
        ({"content": "", "tool_calls": [{**CALL, "result": "ok"}]}, "a tool call of message 1 has 'result'"),
        ({"content": None}, "must have text in 'role' and 'content'"),
        ({"content": "x", "thinking": "a", "reasoning": "b"}, "message 1 has unequal thoughts"),
        ({"content": "x", "reasoning": True}, "a thought must be text"),
        ({"content": "x", "images": ["1.jpg"]}, "message 1 has the key 'images'"),
        ({"content": "x", "value": "y"}, "message 1 has the key 'value'"),
    ],
)
def test_what_cannot_be_read_of_an_answer_is_refused(
    qwen: PreTrainedTokenizerBase, answer: dict[str, Any], message: str
) -> None:
    assert message in refusal_of(qwen, call_row(answer))


@pytest.mark.parametrize("key", ["thought", "think", "thoughts", "rationale", "chain_of_thought"])
def test_a_thought_that_no_template_reads_is_refused_and_can_be_mapped(qwen: PreTrainedTokenizerBase, key: str) -> None:
    row = chat("1+1?", "2")
    row["messages"][1][key] = "easy"
    message = refusal_of(qwen, row)
    assert f"message 1 has the key '{key}'" in message
    assert f"`message_property_mappings: {{reasoning_content: {key}}}`" in message
    mapped = render_row(qwen, row, message_property_mappings={"reasoning_content": key})
    assert "<think>\neasy\n</think>" in mapped.text
    without = render_row(qwen, row, unused_columns=[key])
    assert (without.text, without.ignored) == (render_row(qwen, chat("1+1?", "2")).text, (f"messages[].{key}",))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_known_thoughts_are_learned(qwen: PreTrainedTokenizerBase, key: str) -> None:
    row = chat("1+1?", "2")
    row["messages"][1][key] = "easy"
    assert "<think>\neasy\n</think>" in trained_parts(render_row(qwen, row))[0]
    row["messages"][1] |= {"reasoning_content": "easy", "reasoning": "easy"}
    assert trained_parts(render_row(qwen, row))[0].count("easy") == 1


def test_thoughts_and_calls_of_others_than_the_model_are_refused(qwen: PreTrainedTokenizerBase) -> None:
    row = chat("a", "b")
    row["messages"][0]["reasoning"] = "hm"
    assert "message 0 of the role 'user' has 'reasoning', which only answers have" in refusal_of(qwen, row)


def test_ids_and_dates_of_messages_are_left_out_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("hi", "hello")
    for i, message in enumerate(row["messages"]):
        message |= {"id": f"m{i}", "timestamp": "2026-01-01", "metadata": {"lang": "en"} if i else None}
    one, plain = render_row(tokenizer, row), render_row(tokenizer, chat("hi", "hello"))
    assert (one.text, one.spans) == (plain.text, plain.spans)
    assert one.ignored == ("messages[].id", "messages[].metadata", "messages[].timestamp")


def test_a_key_that_the_template_writes_is_given_to_it(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML.replace("message['role'] +", "message['role'] + message.get('mood', '') +")
    row = chat("a", "b")
    row["messages"][0]["mood"] = " happily"
    one = render_row(tokenizer, row)
    assert one.text.startswith("<|im_start|>user happily\na") and one.ignored == ()
    tokenizer.chat_template = CHATML + "{# .mood #}"
    assert "message 0 has the key 'mood'" in refusal_of(tokenizer, row), "a word in a comment writes nothing"


def test_a_template_that_writes_messages_as_a_whole_gets_all_their_keys(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML + "{{ messages | tojson }}"
    row = chat("a", "b")
    row["messages"][0]["mood"] = "happy"
    assert "writes a text of message 1 twice" in refusal_of(tokenizer, row), "and not: 'mood' is left out"


def test_a_name_that_a_template_writes_now_and_then_is_always_given(tokenizer: PreTrainedTokenizerBase) -> None:
    name = "{% if message.name and message.name != 'Ann' %}{{ ' ' + message.name }}{% endif %}"
    tokenizer.chat_template = CHATML.replace("+ message['role'] +", "+ message['role'] }}" + name + "{{")
    maker = make_maker(tokenizer, "chat_template")
    texts = []
    for said in ("Ann", "Bob"):
        row = chat("a", "b")
        row["messages"][0]["name"] = said
        texts.append(render_with(maker, row).text.splitlines()[0])
    assert texts == ["<|im_start|>user", "<|im_start|>user Bob"]


def test_an_empty_answer_is_learned_as_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert trained_parts(render_row(tokenizer, chat("hi", "", "there?", "yes"))) == ["<|im_end|>", "yes<|im_end|>"]


# --- prompt and completion as lists of messages ---


def two_lists(*contents: str) -> dict[str, Any]:
    messages = chat(*contents)["messages"]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def test_a_completion_of_messages_is_learned_and_its_prompt_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    one = render_row(tokenizer, two_lists("a", "b", "c", "d"), "prompt_completion")
    assert one.text == render_row(tokenizer, chat("a", "b", "c", "d")).text
    assert trained_parts(one) == ["d<|im_end|>"]
    assert one.roles == ("user", "assistant", "user", "assistant")
    row = {**two_lists("a", "b"), "system": "s"}
    assert (
        render_row(tokenizer, row, "prompt_completion").text == render_row(tokenizer, chat("a", "b", system="s")).text
    )


def test_lists_have_tools_template_values_and_roles_as_chats_have(qwen: PreTrainedTokenizerBase) -> None:
    row = {**two_lists("a", "b"), "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    expected = render_row(qwen, {**chat("a", "b"), "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}})
    assert render_row(qwen, row, "prompt_completion") == expected
    row["prompt"] = [{"role": "buyer", "content": "a"}]
    assert render_row(qwen, row, "prompt_completion", roles={"user": ["buyer"]}) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": chat("a")["messages"], "completion": "b"},
            "column 'completion' holds str 'b', and 'prompt' a",
        ),
        (
            {"prompt": "a", "completion": chat("a")["messages"]},
            "column 'prompt' holds str 'a', and 'completion' a",
        ),
        ({"prompt": chat("a")["messages"], "completion": []}, "column 'completion' holds list []"),
        ({"prompt": "a", "completion": "b", "system": "s"}, "column 'system' is not used"),
        ({"prompt": chat("a")["messages"], "completion": ["b"]}, "message 1 of column"),
    ],
)
def test_mixtures_of_texts_and_messages_are_refused(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    assert message in refusal_of(tokenizer, row, "prompt_completion")


def test_texts_need_no_chat_template_and_take_no_keys_of_chats(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    row = {"prompt": "a ", "completion": "b"}
    assert render_row(tokenizer, row, "prompt_completion").text == "a b"
    assert "`roles` is for messages" in refusal_of(tokenizer, row, "prompt_completion", roles={"user": ["x"]})
    assert "has no chat template" in refusal_of(tokenizer, two_lists("a", "b"), "prompt_completion")


@pytest.mark.parametrize(
    ("row", "kind", "advice"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt_completion", "preference learning"),
        ({"chosen": [], "rejected": []}, "chat_template", "preference learning"),
        ({"conversations": []}, "chat_template", "`field_messages: conversations`"),
        ({"messages": []}, "alpaca", "`type: chat_template`, with `field_messages: messages`"),
        ({"prompt": [], "completion": []}, "chat_template", "`type: prompt_completion`, which takes lists of messages"),
        ({"question": "a", "answer": "b"}, "prompt_completion", 'field_output: "answer"'),
    ],
)
def test_rows_of_another_type_are_told_which(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], kind: str, advice: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError) as caught:
        learn(tokenizer, [row], tmp_path, datasets=[{"path": str(path), "type": kind}])
    assert advice in str(caught.value)
