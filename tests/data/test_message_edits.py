"""What an entry asks for in its messages: keys by other names, thoughts split off, no system message."""

from typing import Any

import pytest

from finetuner.data.messages import Conversation, MessageReader
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry


def read(messages: list[dict[str, Any]], **keys: Any) -> Conversation:
    entry = DatasetEntry(path="x", type="chat_template", **keys)
    return MessageReader.of(entry).read({"messages": messages})


def user(text: str = "Why?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str = "So.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def test_a_thought_under_a_name_of_its_own_is_the_messages_thought() -> None:
    conversation = read([user(), answer(cot="Hm.")], message_property_mappings={"reasoning_content": "cot"})
    assert conversation.messages[1] == answer(reasoning_content="Hm.")


def test_calls_and_their_answers_under_other_names_reach_the_template() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "c1"}
    messages = [user(), answer("", calls=[call]), {"role": "tool", "content": "2", "of": "c1", "who": "f"}, answer()]
    names = {"tool_calls": "calls", "tool_call_id": "of", "name": "who"}
    read_as = read(messages, message_property_mappings=names).messages
    assert read_as[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert (read_as[2]["tool_call_id"], read_as[2]["name"]) == ("c1", "f")
    assert not {"calls", "of", "who"} & {key for message in read_as for key in message}


def test_a_null_beside_a_mapped_key_does_not_hide_it_and_another_value_is_an_error() -> None:
    names = {"reasoning_content": "cot"}
    conversation = read([user(), answer(cot="Hm.", reasoning_content=None)], message_property_mappings=names)
    assert conversation.messages[1]["reasoning_content"] == "Hm."
    with pytest.raises(DataError, match="reasoning_content"):
        read([user(), answer(cot="Hm.", reasoning_content="Well.")], message_property_mappings=names)


@pytest.mark.parametrize(
    ("text", "thought", "rest"),
    [
        ("<think>\nHm.\n</think>\n\nSo.", "Hm.", "So."),
        ("<reasoning>Hm.</reasoning> So.", "Hm.", "So."),
        (
            "<|begin_of_thought|> Hm. <|end_of_thought|>\n<|begin_of_solution|> So. <|end_of_solution|>",
            "Hm.",
            "So.",
        ),
        ("<think></think>So.", "", "So."),
    ],
)
def test_split_thinking_takes_the_thought_out_of_an_answers_text(text: str, thought: str, rest: str) -> None:
    conversation = read([user(text), answer(text)], split_thinking=True)
    assert conversation.messages[1] == answer(rest, reasoning_content=thought)
    assert conversation.messages[0] == user(text)  # a question keeps its text
    assert read([user(), answer(text)]).messages[1] == answer(text)  # and so does an answer where nobody asks


@pytest.mark.parametrize("text", ["So.", "<think>Hm.", "</think>So.<think>"])
def test_a_text_without_a_whole_thought_is_left_as_it_is(text: str) -> None:
    assert read([user(), answer(text)], split_thinking=True).messages[1] == answer(text)


def test_drop_system_message_leaves_out_the_first_message_if_it_is_the_systems() -> None:
    system = {"role": "system", "content": "Be kind."}
    conversation = read([system, user(), answer()], drop_system_message=True)
    assert conversation.messages == [user(), answer()]
    assert conversation.trained == (False, True)
    assert read([user(), system, answer()], drop_system_message=True).messages[1] == system
    assert read([system, user(), answer()]).messages[0] == system
    with pytest.raises(DataError, match="drop_system_message"):
        read([system], drop_system_message=True)
