"""`type: instruction_chat`: each part of an instruction row stands where the chat template puts it, or is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.encoding import Encoder
from finetuner.data.formats import load_format
from finetuner.data.formats.base import Rendered
from finetuner.data.token_store import IGNORE_INDEX
from finetuner.errors import DataError, RecipeError
from finetuner.recipe import load
from finetuner.recipe.sections import DataSection, DatasetEntry
from tests.support.rendering import render_row

ROW: dict[str, Any] = {
    "instruction": "Sum up.",
    "input": "One two.",
    "output": "Three.",
    "system": "Be brief.",
    "history": [["Hello", "Hi."], ["Ready?", "Yes."]],
}
WHOLE = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    "<|im_start|>user\nReady?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    "<|im_start|>user\nSum up.\nOne two.<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def render(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], **keys: Any) -> Rendered:
    return render_row(tokenizer, row, "instruction_chat", **keys)


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def test_every_part_of_a_row_is_written_and_all_its_answers_are_learned(tokenizer) -> None:
    rendered = render(tokenizer, ROW)
    assert rendered.text == WHOLE
    assert learned(rendered) == ["Hi.<|im_end|>", "Yes.<|im_end|>", "Three.<|im_end|>"]
    assert rendered.roles == ("system", "user", "assistant", "user", "assistant", "user", "assistant")
    ((ids, labels),) = Encoder(tokenizer).tokenize([rendered])
    assert tokenizer.decode(ids[labels != IGNORE_INDEX]) == "Hi.<|im_end|>Yes.<|im_end|>Three.<|im_end|>"


def test_of_a_conversation_the_last_answer_alone_is_learned_where_the_entry_says_so(tokenizer) -> None:
    rendered = render(tokenizer, ROW, train_on_last_turn=True)
    assert rendered.text == WHOLE
    assert learned(rendered) == ["Three.<|im_end|>"]


def test_the_same_holds_for_rows_of_messages(tokenizer) -> None:
    entry = DatasetEntry(path="rows.jsonl", type="chat_template", train_on_last_turn=True)
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    rendered = load_format("chat_template")(entry, DataSection(datasets=(entry,)), tokenizer)({"messages": messages})
    assert learned(rendered) == ["d<|im_end|>"]


@pytest.mark.parametrize(
    ("instruction", "given", "question"),
    [("Do.", "", "Do."), ("Do.", None, "Do."), ("", "Text.", "Text."), ("Do.", "Text.", "Do.\nText.")],
)
def test_the_question_is_what_there_is_of_instruction_and_input(tokenizer, instruction, given, question) -> None:
    row = {"instruction": instruction, "input": given, "output": "Yes."}
    assert f"user\n{question}<|im_end|>" in render(tokenizer, row).text


def test_columns_of_other_names_are_read_by_those(tokenizer) -> None:
    row = {"q": "Sum up.", "ctx": "One two.", "a": "Three.", "sys": "Be brief.", "past": ROW["history"]}
    names = {"instruction": "q", "input": "ctx", "output": "a", "system": "sys", "history": "past"}
    assert render(tokenizer, row, instruction_columns=names).text == WHOLE


def test_a_column_that_is_not_to_be_read_is_counted_as_ignored(tokenizer) -> None:
    rendered = render(tokenizer, ROW, instruction_columns={"system": "", "history": ""})
    assert rendered.text == WHOLE.rpartition("<|im_start|>user")[1] + WHOLE.rpartition("<|im_start|>user")[2]
    assert rendered.ignored == ("system", "history")


@pytest.mark.parametrize(
    ("row", "names", "said"),
    [
        (ROW | {"images": ["a.png"]}, {}, "column 'images' is not used by `type: instruction_chat`"),
        (ROW | {"messages": [{"role": "user", "content": "Hi"}]}, {}, "column 'messages' is not used"),
        (ROW | {"sys": "Be kind."}, {"system": "sys"}, "column 'system' is not used"),
        (ROW | {"history": "Hello"}, {}, "column 'history' is not JSON"),
        (ROW | {"history": [["Hello"]]}, {}, "column 'history' must be a list of [question, answer]"),
        (ROW | {"history": [{"q": "a", "a": "b"}]}, {}, "column 'history' must be a list of [question, answer]"),
        (ROW | {"output": None}, {}, "column 'output' holds nothing"),
        (ROW | {"tools": '[{"name": "f", "parameters": {}}]'}, {}, "does not write tools"),
    ],
)
def test_a_part_that_would_be_left_out_or_misread_is_refused_by_its_name(tokenizer, row, names, said) -> None:
    with pytest.raises(DataError) as caught:
        render(tokenizer, row, instruction_columns=names)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("type: alpaca\n    train_on_last_turn: true", "train_on_last_turn is for `type: chat_template`"),
        ("type: alpaca\n    instruction_columns: {output: a}", "instruction_columns is for `type: instruction_chat`"),
        ("type: instruction_chat\n  - path: b.jsonl\n    type: chat_template\n    chat_template: chatml",
         "every dataset must be rendered with the same chat template"),
    ],
)  # fmt: skip
def test_keys_that_would_have_no_effect_are_mistakes(tmp_path: Path, entry: str, said: str) -> None:
    path = tmp_path / "r.yml"
    path.write_text(f"base_model: org/m\nlearning_rate: 1e-4\ndatasets:\n  - path: a.jsonl\n    {entry}\n")
    with pytest.raises(RecipeError) as caught:
        load(path, check_files=False)
    assert said in str(caught.value)
