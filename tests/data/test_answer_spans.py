"""Templates with the properties of today's families: what is learned is what stands behind the generation prompt.

Each template is written twice from one text: plain, and with {% generation %} where «» stands. Both must give the same
spans, and a plain one's answer begins where the text that asks for it ends.
"""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from support.template_families import CLOSED_BY_NEXT, TEMPLATES, TOKENS, marked, plain
from support.templates import CONTENTS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.chat_renderer import build_chat_renderer
from finetuner.data.formats.base import Rendered
from finetuner.data.messages import MessageReader
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS}, replace_extra_special_tokens=False)
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    *,
    eot_tokens: tuple[str, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    **keys: Any,
) -> Rendered:
    tokenizer.chat_template = template
    entry = DatasetEntry.model_validate({"path": "rows.jsonl", "type": "chat_template"} | keys)
    chat = build_chat_renderer(
        tokenizer, kwargs=kwargs or {}, eot_tokens=eot_tokens, train_on_eos=entry.train_on_eos, train_on_eot=None
    )
    return chat.render(MessageReader.of(entry).read({"messages": messages}))


def learned(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], **keys: Any
) -> list[str]:
    one = render(tokenizer, template, messages, **keys)
    return [one.text[start:stop] for start, stop in one.spans]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "abc123def", "name": "add"}


def said(content: str | None, *calls: Any, **more: Any) -> dict[str, Any]:
    own = [{"id": "abc123def", "type": "function", "function": {"name": "add", "arguments": one}} for one in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": own} if own else {}), **more}


PLAIN = [user("Capital of Peru?"), said("Lima.")]
ROUNDS = [*PLAIN, user("Of Chile?"), said("Santiago."), user("Lima."), said("[INST]Capital of Peru?")]
CALLED = [user("1 + 2?"), said(None, {"a": 1}), tool("3"), said("It is 3."), user("4 + 5?"), said("9.")]
SHAPES = {
    "plain": PLAIN,
    "rounds": ROUNDS,
    "system": [system("Be brief."), *ROUNDS],
    "calls": CALLED,
    "chain of calls": [
        user("1 + 2 + 3?"),
        said(None, {"a": 1}),
        tool("3"),
        said(None, {"b": 3}),
        tool("6"),
        said("6."),
    ],
    "call at the end": [*PLAIN, user("1 + 2?"), said(None, {"a": 1, "b": "Of Chile?"})],
    "two calls": [user("both?"), said(None, {"a": 1}, {"b": [{}]}), tool("1"), tool("2"), said("1 and 2.")],
    "call beside text": [user("1 + 2?"), said("I add.", {"a": 1}), tool("3"), said("3.")],
    "no arguments": [user("now?"), said(None, {}), tool("3"), said("3.")],
}
# what these templates have no form for
WITHOUT = {
    "channels": {"two calls", "call beside text"},
    "brackets": {"call beside text"},
    "text arguments": {"system", "call beside text"},
    "always asks": {"calls", "chain of calls", "call at the end", "two calls", "call beside text", "no arguments"},
    "opened thought": {"system"},
    "results inside": {"system"},
}  # fmt: skip
for _name in ("closed thought", "system thrice"):
    WITHOUT[_name] = WITHOUT["always asks"]
EACH = [(name, shape) for name in TEMPLATES for shape in SHAPES if shape not in WITHOUT.get(name, ())]


@pytest.mark.parametrize(("name", "shape"), EACH)
def test_a_plain_template_learns_what_its_marked_variant_marks(
    tokenizer: PreTrainedTokenizerBase, name: str, shape: str
) -> None:
    text, messages = TEMPLATES[name], SHAPES[shape]
    unmarked = render(tokenizer, plain(text), messages)
    oracle = render(tokenizer, marked(text), messages)
    assert unmarked.text == oracle.text
    spans = [unmarked.text[start:stop] for start, stop in unmarked.spans]
    assert spans == [oracle.text[start:stop] for start, stop in oracle.spans if start < stop]
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)


def random_conversation(chosen: random.Random, name: str) -> list[dict[str, Any]]:
    """Rounds of questions and answers with texts that look like a template's own, and calls where there is a form."""
    texts = [text for text in CONTENTS if text.strip() and "</think>" not in text] + [*TOKENS, "<|end|>\n<|start|>user"]
    messages = [system(chosen.choice(texts))] * (chosen.randint(0, 1) if "system" not in WITHOUT.get(name, ()) else 0)
    for _ in range(chosen.randint(1, 4)):
        messages.append(user(chosen.choice(texts)))
        if "calls" not in WITHOUT.get(name, ()):
            for _ in range(chosen.choice([0, 0, 1, 2])):
                arguments = {chosen.choice("abc"): chosen.choice([*texts, 1, None, ["x"]]) for _ in range(2)}
                messages += [said(None, arguments), tool(chosen.choice(texts))]
        messages.append(said(chosen.choice(texts)))
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_learn_what_the_marked_variant_marks(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    chosen = random.Random(16)
    entry = DatasetEntry.model_validate({"path": "rows.jsonl", "type": "chat_template"})
    renderers = []
    for text in (plain(TEMPLATES[name]), marked(TEMPLATES[name])):
        own = copy.deepcopy(tokenizer)
        own.chat_template = text
        renderers.append(build_chat_renderer(own, kwargs={}, eot_tokens=None, train_on_eos="turn", train_on_eot=None))
    for _ in range(150):
        conversation = MessageReader.of(entry).read({"messages": random_conversation(chosen, name)})
        unmarked, oracle = (one.render(conversation) for one in renderers)
        assert unmarked.text == oracle.text
        assert unmarked.spans == tuple((start, stop) for start, stop in oracle.spans if start < stop)


@pytest.mark.parametrize(("name", "shape"), EACH)
def test_an_answer_begins_where_the_text_that_asks_for_it_ends(
    tokenizer: PreTrainedTokenizerBase, name: str, shape: str
) -> None:
    messages = SHAPES[shape]
    one = render(tokenizer, plain(TEMPLATES[name]), messages)
    for i, message in enumerate(messages):
        given = [{**m, "content": m["content"] or ""} for m in messages[:i]]
        is_asked = message["role"] == "assistant" and messages[i - 1]["role"] == "user"
        if is_asked and not (name == "text arguments" and any("tool_calls" in m for m in given)):
            asked = str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
            start = one.spans[sum(m["role"] == "assistant" for m in messages[:i])][0]
            if one.text.startswith(asked):
                assert start == len(asked)
            else:  # what was said before is written otherwise: an opened thought, the system text
                assert name in ("opened thought", "closed thought", "brackets")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_costs_one_rendering_once_its_shape_is_known(
    tokenizer: PreTrainedTokenizerBase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = plain(TEMPLATES[name])
    entry = DatasetEntry.model_validate({"path": "rows.jsonl", "type": "chat_template"})
    chat = build_chat_renderer(tokenizer, kwargs={}, eot_tokens=None, train_on_eos="turn", train_on_eot=None)
    reader = MessageReader.of(entry)
    chat.render(reader.read({"messages": ROUNDS}))
    counted = []
    own = ChatTemplate.render

    def count(self: ChatTemplate, *args: Any, **keys: Any) -> str:
        counted.append(1)
        return own(self, *args, **keys)

    monkeypatch.setattr(ChatTemplate, "render", count)
    others = [{**message, "content": message["content"] + "!"} for message in ROUNDS]
    one = chat.render(reader.read({"messages": others}))
    assert len(counted) == 1
    assert [one.text[a:b] for a, b in one.spans] == [
        re.sub(re.escape(m["content"]), m["content"] + "!", text)
        for m, text in zip(
            [m for m in ROUNDS if m["role"] == "assistant"],
            learned(tokenizer, plain(TEMPLATES[name]), ROUNDS),
            strict=True,
        )
    ]


# --- what is behind the prompt ---


def test_a_channels_header_is_learned_and_so_are_both_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    template = plain(TEMPLATES["channels"])
    for eot_tokens in (None, ("<|end|>", "<|return|>", "<|call|>")):
        assert learned(tokenizer, template, [system("Be brief."), *PLAIN, *PLAIN], eot_tokens=eot_tokens) == [
            "<|channel|>final<|message|>Lima.<|end|>",
            "<|channel|>final<|message|>Lima.<|return|>",
        ]


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_a_thought_is_given_to_the_template_under_the_name_that_it_reads(
    tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    own = TEMPLATES["channels"]
    for name in ("thinking", "reasoning_content", "reasoning", "thought"):
        template = plain(own.replace("m.thinking", f"m.{name}"))
        assert learned(tokenizer, template, [user("Capital?"), said("Lima.", **{key: "It is on the coast."})]) == [
            "<|channel|>analysis<|message|>It is on the coast.<|end|><|start|>assistant"
            "<|channel|>final<|message|>Lima.<|return|>"
        ]


def test_a_system_text_before_the_last_question_changes_no_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    template = plain(TEMPLATES["brackets"])
    with_system = render(tokenizer, template, [system("Be brief."), *ROUNDS])
    assert with_system.text.index("Be brief.") > with_system.text.index("Santiago.")
    assert [with_system.text[a:b] for a, b in with_system.spans] == learned(tokenizer, template, ROUNDS)


def test_an_empty_thought_behind_the_prompt_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learned(tokenizer, plain(TEMPLATES["opened thought"]), ROUNDS) == [
        "Lima.<|end|>", "Santiago.<|end|>", "\n</think>\n\n[INST]Capital of Peru?<|end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("given", [{"a": 1, "b": "é\n"}, '{"a": 1,  "b": "é"}'], ids=["object", "text"])
def test_arguments_are_given_as_the_template_takes_them(tokenizer: PreTrainedTokenizerBase, given: Any) -> None:
    messages = [user("1 + 2?"), said(None, given), tool("3"), said("3.")]
    as_text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    value = json.loads(given) if isinstance(given, str) else given
    as_json = json.dumps(value, ensure_ascii=False)
    assert learned(tokenizer, plain(TEMPLATES["text arguments"]), messages)[0] == (
        f"<C>add<SEP>{as_text}</C>{tokenizer.eos_token}"
    )
    assert as_json in learned(tokenizer, plain(TEMPLATES["ends of turns"]), messages)[0]
    either = plain(TEMPLATES["opened thought"]).replace(
        "c.function.arguments | tojson",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    )
    assert (as_text if isinstance(given, str) else as_json) in learned(tokenizer, either, messages)[0]


def test_null_arguments_stay_in_either_form(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("text arguments", "ends of turns", "opened thought"):
        text = learned(tokenizer, plain(TEMPLATES[name]), [user("q"), said(None, '{"q": 1, "limit": null}')])[0]
        assert '{"q": 1, "limit": null}' in text


def test_arguments_that_are_no_json_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("text arguments", "ends of turns"):
        with pytest.raises(DataError, match=r"message 1: the arguments of 'add' are not JSON .*: '\{a: 1\}'"):
            learned(tokenizer, plain(TEMPLATES[name]), [user("q"), said(None, "{a: 1}")])


def test_a_call_that_is_left_out_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"writes 1 of 2 tool calls 'add' of message 1\. .* a message of its own"):
        learned(tokenizer, plain(TEMPLATES["channels"]), SHAPES["two calls"])
    with pytest.raises(DataError, match=r"does not write the text of message 1 \(assistant\) beside its tool calls"):
        learned(tokenizer, plain(TEMPLATES["brackets"]), SHAPES["call beside text"])


def test_text_behind_the_results_of_its_calls_is_learned_and_they_are_not(tokenizer: PreTrainedTokenizerBase) -> None:
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|turn>user\n' + m.content + '<turn|>\n' }}"
        "{% elif m.role == 'assistant' %}"
        "{% if loop.previtem.role == 'user' %}{{ '<|turn>model\n' }}{% endif %}"
        "{% for c in m.tool_calls or [] %}"
        "<|call>{{ c.function.name }}{{ c.function.arguments | tojson }}<call|>{% endfor %}"
        "{% if m.tool_calls %}{% for r in messages[loop.index:] if r.role == 'tool' %}<|result>{{ r.content }}<result|>"
        "{% endfor %}{% endif %}{{ m.content }}"
        "{% if loop.last or loop.nextitem.role == 'user' or not m.tool_calls %}<turn|>{{ '\n' }}{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>model\n' }}{% endif %}"
    )
    messages = [user("1 + 2?"), said("I have it.", {"a": 1}), tool("3"), said("It is 3.")]
    assert learned(tokenizer, template, messages) == ['<|call>add{"a": 1}<call|>', "I have it.", "It is 3.<turn|>"]
    messages[1] = said("", {"a": 1})
    assert learned(tokenizer, template, messages) == ['<|call>add{"a": 1}<call|>', "It is 3.<turn|>"]


def test_answers_in_a_row_and_at_the_beginning_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    template = plain(TEMPLATES["opened thought"]).replace("<think>\\n", "")
    messages = [said("Hello."), *PLAIN, said("The capital."), user("?"), said("!")]
    assert learned(tokenizer, template, messages)[:3] == ["Hello.<|end|>", "Lima.<|end|>", "The capital.<|end|>"]


def test_a_text_or_a_call_that_is_left_out_is_refused_whatever_is_marked_or_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    two = [{**message, "train": False} for message in SHAPES["two calls"][:-1]] + SHAPES["two calls"][-1:]
    for template in (plain(TEMPLATES["channels"]), marked(TEMPLATES["channels"])):
        for messages in (two, SHAPES["two calls"]):
            with pytest.raises(DataError, match="writes 1 of 2 tool calls 'add' of message 1"):
                learned(tokenizer, template, messages)
    silent = marked(TEMPLATES["always asks"]).replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(DataError, match=r"does not write the text of message 0 \(system\)"):
        learned(tokenizer, silent, [system("Be brief."), *PLAIN])
    assert learned(tokenizer, silent.replace("m.content", "m.content | upper"), PLAIN) == ["LIMA.<E>"]


def test_a_token_within_a_calls_arguments_is_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [user("1?"), said(None, {"a": "<|user|> and <|tool|>"}), tool("3"), said("3.")]
    spans = learned(tokenizer, CLOSED_BY_NEXT, messages, eot_tokens=("<|user|>", "<|tool|>"))
    assert spans == ['<C>add{"a": "<|user|> and <|tool|>"}</C><|tool|>', "3.<|user|>"]
    with pytest.raises(DataError, match=r"eot_tokens: \['<\|tool\|>', '<\|user\|>'\]"):
        learned(tokenizer, CLOSED_BY_NEXT, messages, eot_tokens=("<|user|>",))


CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}TEXT"
    "{% for c in m.tool_calls or [] %}<C>{{ c.function.name }}{{ c.function.arguments | tojson }}</C>{% endfor %}"
    "<|end|>LAST\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ODD_TEMPLATES = {
    "says more behind the last question": CHATML.replace("TEXT", "{{ m.content + (' (now)' if loop.last else '') }}"),
    "asks users only": CHATML + "{{ raise_exception('?') if add_generation_prompt and messages[-1].role != 'user' }}",
    "never asks": CHATML.split("{% if add_")[0],
    "ends the text": CHATML.replace(
        "LAST", "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", ODD_TEMPLATES)
def test_templates_that_ask_or_end_in_an_odd_way_learn_the_same(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template = ODD_TEMPLATES[name].replace("TEXT", "{{ m.content }}").replace("LAST", "")
    if name.startswith("says more"):  # of a question; an answer is no such text
        template = template.replace("if loop.last", "if loop.last and m.role == 'user'")
    last = tokenizer.eos_token if name == "ends the text" else ""
    assert learned(tokenizer, template, CALLED) == ['<C>add{"a": 1}</C><|end|>', "It is 3.<|end|>", f"9.<|end|>{last}"]


# --- turns that the next turn's role closes ---


def test_the_next_roles_token_is_the_learned_end_where_the_recipe_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    """The last answer ends with the token of the question that would follow: nothing else teaches it to stop."""
    one = render(tokenizer, CLOSED_BY_NEXT, ROUNDS[:4], eot_tokens=("<|user|>",))
    assert [one.text[a:b] for a, b in one.spans] == ["Lima.<|user|>", "Santiago.<|user|>"]
    assert (
        one.text == "<|user|>\nCapital of Peru?<|assistant|>\nLima.<|user|>\nOf Chile?<|assistant|>\nSantiago.<|user|>"
    )
    assert learned(tokenizer, CLOSED_BY_NEXT, PLAIN, eot_tokens=("<|user|>",)) == ["Lima.<|user|>"]
    assert learned(tokenizer, CLOSED_BY_NEXT, PLAIN, eot_tokens=("<|user|>",), train_on_eos="none") == ["Lima."]


def test_the_advice_for_such_a_template_leads_on(tokenizer: PreTrainedTokenizerBase) -> None:
    eot_tokens: tuple[str, ...] | None = None
    for _ in range(3):
        try:
            spans = learned(tokenizer, CLOSED_BY_NEXT, CALLED, eot_tokens=eot_tokens)
            break
        except DataError as error:
            found = re.search(r"no token that ends the turn.*`eot_tokens: \[(.*)\]`", str(error))
            assert found is not None
            eot_tokens = tuple(re.findall(r"'([^']+)'", found.group(1)))
    assert eot_tokens == ("<|tool|>", "<|user|>")
    assert spans == ['<C>add{"a": 1}</C><|tool|>', "It is 3.<|user|>", "9.<|user|>"]
    last_call = learned(tokenizer, CLOSED_BY_NEXT, CALLED[:2], eot_tokens=eot_tokens)
    assert last_call == ['<C>add{"a": 1}</C><|tool|>']


# --- thoughts that are left out ---

GUARDED = plain(TEMPLATES["results inside"])
THOUGHT = {"reasoning_content": "It is on the coast."}


def test_the_thought_of_the_answer_in_hand_is_not_left_out_silently(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"leaves out the thought of message 1, an answer to the last question.*rows"):
        render(tokenizer, GUARDED, [user("Capital?"), said("Lima.", **THOUGHT)])
    cut = plain(TEMPLATES["ends of turns"]).replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    with pytest.raises(DataError, match="leaves out the thought of message 1"):
        render(tokenizer, cut, [user("Capital?"), said("<think>\nIt is on the coast.\n</think>\n\nLima.")])


def test_a_switch_of_the_template_is_named_if_it_has_the_thought_written(tokenizer: PreTrainedTokenizerBase) -> None:
    switched = GUARDED.replace("m.tool_calls and m.r", "(m.tool_calls or preserve_thinking) and m.r")
    row = [user("Capital?"), said("Lima.", **THOUGHT)]
    with pytest.raises(DataError, match=r"`chat_template_kwargs: \{preserve_thinking: true\}`"):
        render(tokenizer, switched, row)
    assert learned(tokenizer, switched, row, kwargs={"preserve_thinking": True}) == [
        "<think>It is on the coast.</think>Lima.<turn|>"
    ]
    never = GUARDED + "{# enable_thinking #}"
    with pytest.raises(DataError) as caught:
        render(tokenizer, never, row)
    assert "enable_thinking" not in str(caught.value)


def test_other_thoughts_that_are_left_out_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    opened = plain(TEMPLATES["opened thought"])
    rounds = [user("Capital?"), said("Lima.", **THOUGHT), user("Why?"), said("It is.", reasoning_content="So.")]
    assert render(tokenizer, opened, rounds).left_out_thoughts == 1
    assert render(tokenizer, opened, rounds[:2]).left_out_thoughts == 0
    # beside a call it is written, behind the result it is not
    calls = [user("1 + 2?"), said(None, {"a": 1}, **THOUGHT), tool("3"), said("3.", reasoning_content="So.")]
    one = render(tokenizer, GUARDED, calls)
    assert one.left_out_thoughts == 1
    assert "It is on the coast." in one.text
    # a turn that is not learned
    assert render(tokenizer, GUARDED, [user("?"), said("Lima.", **THOUGHT, train=False)]).left_out_thoughts == 1
    assert render(tokenizer, marked(TEMPLATES["opened thought"]), rounds).left_out_thoughts == 1


def test_thoughts_that_no_template_key_reads_are_refused_by_what_is_true(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        DataError, match=r"does not write the thoughts of messages \(it reads none of reasoning_content, "
    ):
        render(tokenizer, CLOSED_BY_NEXT, [user("Capital?"), said("Lima.", **THOUGHT)])
