"""Axolotl's prompt styles: rows become the text that Axolotl writes, and the answer is trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetuner.data.formats import load_format
from finetuner.data.formats.base import Rendered
from finetuner.errors import DataError, RecipeError
from finetuner.recipe import load
from finetuner.recipe.foreign.prompt_styles import OTHERS, SAME_AS_OURS, STYLES

TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TASK_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
CONCISE = (
    "SYSTEM: Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that "
    "appropriately and concisely completes the request.\n\n\n"
)
CONCISE_INPUT = (
    "SYSTEM: Below is an instruction from a USER that describes a task, paired with an input that provides further "
    "context. The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n\n"
)
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
ALONE = {"instruction": "Add.", "input": "", "output": "3"}
ORCA = {"system_prompt": "Be kind.", "question": "Why?", "response": "So."}
INSTRUCT = f"{TASK_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
CHAT = f"SYSTEM: {TASK_INPUT}\nUSER: Add.\n1 2\nASSISTANT:"
CHAT_ALONE = f"SYSTEM: {TASK}\nUSER: Add.\nASSISTANT:"
CHATML = f"<|im_start|>system\n{TASK_INPUT}<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n"
PHI = f"<|system|>\n{TASK_INPUT}<|end|>\n<|user|>\nAdd.<|end|>1 2<|assistant|>"
CREATIVE = (
    "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response should "
    "be relevant, accurate, and free of any ambiguity."
)
CONTEXT = "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"

# (type, row, prompt, answer), as Axolotl 0.19.0's own classes make them of these rows
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("alpaca", ALPACA, INSTRUCT, "3"),
    ("alpaca:instruct", ALPACA, INSTRUCT, "3"),
    ("alpaca:chat", ALPACA, CHAT, "3"),
    ("alpaca:chat", ALONE, CHAT_ALONE, "3"),
    ("alpaca:chat", {"instruction": "Add.", "output": "3"}, CHAT_ALONE, "3"),
    ("alpaca:chatml", ALPACA, CHATML, "3"),
    ("alpaca:phi", ALPACA, PHI, "3"),
    ("alpaca:phi", ALONE, f"<|system|>\n{TASK}<|end|>\n<|user|>\nAdd.<|end|>\n<|assistant|>\n", "3"),
    ("alpaca_instruct", ALPACA, INSTRUCT, "3"),
    ("alpaca_instruct.load_no_prompt", ALONE, "### Instruction:\nAdd.\n\n### Response:\n", "3"),
    ("alpaca_chat", ALPACA, CHAT, "3"),
    ("alpaca_chat.load", ALONE, CHAT_ALONE, "3"),
    ("alpaca_chat.load_no_prompt", ALPACA, "USER: Add.\n1 2\nASSISTANT:", "3"),
    ("alpaca_chat.load_concise", ALPACA, CONCISE_INPUT + "USER: Add.\n1 2\nASSISTANT:", "3"),
    ("alpaca_chat.load_qa", {"question": "Why?", "answer": "So."}, CONCISE + "USER: Why?\nASSISTANT:", "So."),
    ("alpaca_chat.load_camel_ai", {"message_1": "Why?", "message_2": "So."}, CONCISE + "USER: Why?\nASSISTANT:", "So."),
    ("alpaca_w_system", ALPACA | {"system": "Be."}, "SYSTEM: Be.\nUSER: Add.\n1 2\nASSISTANT:", "3"),
    ("alpaca_w_system.load_chat", ALONE | {"system": ""}, "USER: Add.\nASSISTANT:", "3"),
    (
        "alpaca_w_system.load_instruct",
        ALONE | {"system": "Be."},
        "Be.\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    ),
    ("alpaca_w_system.load_open_orca", ORCA, "### System:\nBe kind.\n### Human:\nWhy?\n### Assistant:\n", "So."),
    (
        "alpaca_w_system.load_open_orca_chatml",
        ORCA,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "So.",
    ),
    ("orcamini", ORCA, "### System:\nBe kind.\n\n### User:\nWhy?\n\n### Response:\n", "So."),
    ("gpteacher", {"instruction": "Add.", "input": "1 2", "response": "3"}, INSTRUCT, "3"),
    ("gpteacher:instruct", {"instruction": "Add.", "input": "1 2", "response": "3"}, INSTRUCT, "3"),
    ("gpteacher:chat", {"instruction": "Add.", "response": "3"}, CHAT_ALONE, "3"),
    ("gpteacher:chatml", {"instruction": "Add.", "input": "1 2", "response": "3"}, CHATML, "3"),
    ("gpteacher:phi", {"instruction": "Add.", "input": "1 2", "response": "3"}, PHI, "3"),
    (
        "oasst",
        {"INSTRUCTION": "Add.", "RESPONSE": "3"},
        f"{TASK}\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    ),
    (
        "oasst:instruct",
        {"INSTRUCTION": "Add.", "RESPONSE": "3"},
        f"{TASK}\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    ),
    ("oasst:chat", {"INSTRUCTION": "Add.", "RESPONSE": "3"}, CHAT_ALONE, "3"),
    (
        "oasst:chatml",
        {"INSTRUCTION": "Add.", "RESPONSE": "3"},
        f"<|im_start|>system\n{TASK}<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n",
        "3",
    ),
    (
        "oasst:phi",
        {"INSTRUCTION": "Add.", "RESPONSE": "3"},
        f"<|system|>\n{TASK}<|end|>\n<|user|>\nAdd.<|end|>\n<|assistant|>\n",
        "3",
    ),
    *(
        (f"jeopardy{style}", {"question": "Add.", "category": "1 2", "answer": "3"}, prompt, "what is 3")
        for style, prompt in (("", INSTRUCT), (":instruct", INSTRUCT), (":chat", CHAT), (":chatml", CHATML))
    ),
    ("jeopardy:phi", {"question": "Add.", "category": "1 2", "answer": "3"}, PHI, "what is 3"),
    (
        "summarizetldr",
        {"article": "Long.", "summary": "L."},
        "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:",
        "L.",
    ),
    (
        "summarizetldr:chat",
        {"article": "Long.", "summary": "L."},
        "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:",
        "L.",
    ),
    (
        "context_qa",
        {"article": "Text.", "question": "Why?", "answer": "So."},
        CONTEXT + "USER: Text.\n===\nWhy?\nASSISTANT:",
        "So.",
    ),
    (
        "context_qa.load",
        {"article": "Text.", "question": "", "answer": "So."},
        CONTEXT + "USER: Text.\n===\n\nASSISTANT:",
        "So.",
    ),
    (
        "context_qa.load_v2",
        {"context": "Text.", "question": "Why?", "answer": "So."},
        "Context: Text.\nQuestion: Why?\n",
        "Answer: So.",
    ),
    (
        "creative_acr.load_answer",
        {"instruction": "Why?", "revision": "So."},
        f"{CREATIVE}\nUSER: Why?\nASSISTANT:",
        "So.",
    ),
]
RECIPE = "base_model: org/model\nlearning_rate: 1e-4\ndatasets:\n  - path: org/rows\n    type: "


@pytest.fixture
def render(tmp_path: Path, tokenizer_folder: Path) -> Callable[[str, dict[str, Any]], Rendered]:
    """Renders a row as a recipe with this text behind `type:` does."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def render_row(kind: str, row: dict[str, Any]) -> Rendered:
        path = tmp_path / "recipe.yml"
        path.write_text(RECIPE + kind + "\n")
        section = load(path).recipe.data
        (entry,) = section.datasets
        return load_format(entry.row_format)(entry, section, tokenizer)(row)

    return render_row


@pytest.mark.parametrize(("kind", "row", "prompt", "answer"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_a_style_writes_axolotls_prompt_and_trains_on_the_answer(render, kind, row, prompt, answer) -> None:
    rendered = render(kind, row)
    assert rendered.text == prompt + answer
    assert rendered.spans == ((len(prompt), len(prompt) + len(answer)),)
    assert rendered.wraps


def test_each_style_has_a_case() -> None:
    assert sorted({kind for kind, *_ in CASES} & {*STYLES, *SAME_AS_OURS}) == sorted(
        {*STYLES, *SAME_AS_OURS} - {"completion", "input_output", "chat_template", "chat_template.default"}
    )


def test_what_looks_like_a_marker_in_a_row_stays_text_and_the_styles_own_markers_are_tokens(render) -> None:
    row = {"instruction": "Say <|im_end|>", "output": "3"}
    rendered = render("alpaca:chatml", row)
    start = rendered.text.index("Say")
    assert (start, start + len("Say <|im_end|>")) in rendered.contents
    assert rendered.text.index("<|im_start|>user") not in range(*rendered.contents[0])


def test_a_missing_column_of_a_style_is_named(render) -> None:
    with pytest.raises(DataError, match="no column 'question'"):
        render("jeopardy", {"instruction": "x", "answer": "y"})


@pytest.mark.parametrize("kind", [*OTHERS, "explainchoice:chat", "alpaca:vicuna", "creative_acr.load_critique"])
def test_a_style_of_another_shape_is_refused_with_what_to_write(render, kind: str) -> None:
    with pytest.raises(RecipeError) as refused:
        render(kind, {})
    assert f"type: '{kind}' is not supported yet: " in str(refused.value)
    assert any(word in str(refused.value) for word in ("Write", "write", "Read here"))


def test_the_block_that_metharmes_refusal_names_can_be_written(render) -> None:
    block = OTHERS["metharme"][1].partition("`type: ")[2].rstrip("`")
    rendered = render(block, {"prompt": "<|user|>Hi<|model|>", "generation": "Ho"})
    assert rendered.text == "<|user|>Hi<|model|>Ho"


def test_an_answer_is_written_as_output_format_says_and_all_of_it_is_trained_on(render) -> None:
    rendered = render("\n      output_format: 'It is {output}!'\n      no_input_format: '{instruction} '", ALONE)
    assert rendered.text == "Add. It is 3!"
    assert rendered.spans == ((5, 13),)
    with pytest.raises(RecipeError, match=r"output_format has no \{output\}"):
        render("\n      output_format: 'yes'", ALONE)


def test_an_empty_name_of_a_column_reads_none(render) -> None:
    row = {"instruction": "Add.", "output": "3", "": "from a CSV's first column"}
    block = '\n      field_input: ""\n      field_system: ""\n      no_input_format: "{instruction}:"'
    assert render(block, row).text == "Add.:3"
