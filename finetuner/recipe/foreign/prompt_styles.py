"""Axolotl's prompt styles: row types that are one prompt and one answer, as the block of `type` that says the same.

Their texts and columns are facts of axolotl-ai-cloud/axolotl 0.19.0: its modules prompters, prompt_tokenizers and
utils.data.wrappers, and its folder prompt_strategies. A style reads no other column than those in its block.
"""

from collections.abc import Mapping
from typing import NamedTuple

Block = Mapping[str, str]


class _Turns(NamedTuple):
    """Words around a system text, around a prompt with an input, and around one without."""

    system: str
    with_input: str
    without: str

    def saying(self, with_input: str, without: str | None = None, *, columns: Block | None = None) -> Block:
        """Return the block of a style whose system text is always the same (another beside an input, if two are given).

        `columns`: its field_ keys, and output_format.
        """
        alone = with_input if without is None else without
        return {
            "field_system": "",
            **(columns or {}),
            "format": self._system(with_input) + self.with_input,
            "no_input_format": self._system(alone) + self.without,
        }

    def reading_system(self, columns: Block | None = None) -> Block:
        """Return the block of a style whose system text is in a column of the row."""
        return {
            **(columns or {}),
            "system_format": self.system,
            "format": self.with_input,
            "no_input_format": self.without,
        }

    def _system(self, text: str) -> str:
        return self.system.replace("{system}", text) if text else ""


_CHATML_END = "<|im_end|>\n<|im_start|>assistant\n"
_TURNS = {
    "instruct": _Turns(
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": _Turns("SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"),
    "chatml": _Turns(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}" + _CHATML_END,
        "<|im_start|>user\n{instruction}" + _CHATML_END,
    ),
    "phi": _Turns(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
}
_ORCA = _Turns(
    "### System:\n{system}\n",
    "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "### Human:\n{instruction}\n### Assistant:\n",
)
_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_ALPACA = (
    f"{_TASK}{_INPUT}. Write a response that appropriately completes the request.",
    f"{_TASK}. Write a response that appropriately completes the request.",
)
_FROM_USER = "Below is an instruction from a USER that describes a task"
_CONCISE = (
    f"{_FROM_USER}{_INPUT}. The ASSISTANT writes a response that concisely and appropriately completes the request."
    "\n\n",
    f"{_FROM_USER}. The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n",
)
_CONTEXT = "Use the following contextual information to concisely answer the question.\n"
_CREATIVE = (
    "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response should "
    "be relevant, accurate, and free of any ambiguity."
)
_SUMMARY = "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:"
_ORCA_COLUMNS = {
    "field_system": "system_prompt",
    "field_instruction": "question",
    "field_input": "",
    "field_output": "response",
}


def _pair(prompt: str, answer: str) -> dict[str, str]:
    """The columns of rows that are a prompt and an answer alone."""
    return {"field_instruction": prompt, "field_input": "", "field_output": answer}


def _styled(name: str, columns: Block | None = None) -> dict[str, Block]:
    """`name` and `name:chat` and its kind: Stanford Alpaca's system texts in each of the styles, on some columns."""
    styles = {f"{name}:{style}": turns.saying(*_ALPACA, columns=columns) for style, turns in _TURNS.items()}
    return {name: styles[f"{name}:instruct"], **styles}


STYLES: dict[str, Block] = {
    **_styled("alpaca"),
    **_styled("gpteacher", {"field_output": "response"}),
    **_styled("oasst", _pair("INSTRUCTION", "RESPONSE")),
    **_styled(
        "jeopardy",
        {
            "field_instruction": "question",
            "field_input": "category",
            "field_output": "answer",
            "output_format": "what is {output}",
        },
    ),
    "alpaca_instruct": _TURNS["instruct"].saying(*_ALPACA),
    "alpaca_instruct.load_no_prompt": _TURNS["instruct"].saying(""),
    "alpaca_chat": _TURNS["chat"].saying(*_ALPACA),
    "alpaca_chat.load_no_prompt": _TURNS["chat"].saying(""),
    "alpaca_chat.load_concise": _TURNS["chat"].saying(*_CONCISE),
    "alpaca_chat.load_qa": _TURNS["chat"].saying(*_CONCISE, columns=_pair("question", "answer")),
    "alpaca_chat.load_camel_ai": _TURNS["chat"].saying(*_CONCISE, columns=_pair("message_1", "message_2")),
    "alpaca_w_system": _TURNS["chat"].reading_system(),
    "alpaca_w_system.load_chat": _TURNS["chat"].reading_system(),
    "alpaca_w_system.load_instruct": _TURNS["instruct"].reading_system(),
    "alpaca_w_system.load_open_orca": _ORCA.reading_system(_ORCA_COLUMNS),
    "alpaca_w_system.load_open_orca_chatml": _TURNS["chatml"].reading_system(_ORCA_COLUMNS),
    "orcamini": {
        **_ORCA_COLUMNS,
        "no_input_format": "### System:\n{system}\n\n### User:\n{instruction}\n\n### Response:\n",
    },
    "summarizetldr": {"field_system": "", **_pair("article", "summary"), "no_input_format": _SUMMARY},
    "context_qa": {
        "field_system": "",
        "field_instruction": "article",
        "field_input": "question",
        "field_output": "answer",
        "format": f"SYSTEM: {_CONTEXT}\nUSER: {{instruction}}\n===\n{{input}}\nASSISTANT:",
        "no_input_format": f"SYSTEM: {_CONTEXT}\nUSER: {{instruction}}\n===\n\nASSISTANT:",
    },
    "context_qa.load_v2": {
        "field_system": "",
        "field_instruction": "context",
        "field_input": "question",
        "field_output": "answer",
        "format": "Context: {instruction}\nQuestion: {input}\n",
        "no_input_format": "Context: {instruction}\nQuestion: \n",
        "output_format": "Answer: {output}",
    },
    "creative_acr.load_answer": {
        "field_system": "",
        **_pair("instruction", "revision"),
        "no_input_format": f"{_CREATIVE}\nUSER: {{instruction}}\nASSISTANT:",
    },
}
SAME_AS_OURS = {
    "alpaca": "alpaca",
    "alpaca:instruct": "alpaca",
    "alpaca_instruct": "alpaca",
    "completion": "completion",
    "input_output": "input_output",
    "chat_template": "chat_template",
    "chat_template.default": "chat_template",
}

_BLOCK = "Write a `type` block of field_* keys and format"
# The start of other names -> (the capability, what to write).
OTHERS: dict[str, tuple[str, str]] = {
    "metharme": (
        "three end-of-text tokens behind an answer",
        'To learn one, write `type: {field_instruction: prompt, field_output: generation, field_input: "", '
        'no_input_format: "{instruction}"}`',
    ),
    "pygmalion": (
        "Pygmalion's personas",
        "Write `type: chat_template` and `chat_template: metharme`, which is near it",
    ),
    "llama2_chat": (
        "Llama 2's chats in words of its own",
        "Write `type: chat_template`, which takes the model's own template",
    ),
    "reflection": ("answers of three columns", "Join them into one column. " + _BLOCK),
    "alpaca_reflect": ("answers of three columns", "Join them into one column. " + _BLOCK),
    "explainchoice": ("choices in a list", "Join the choices into one column. " + _BLOCK),
    "concisechoice": ("choices in a list", "Join the choices into one column. " + _BLOCK),
    "context_qa.load_404": ("one answer for all rows", "Write it into a column. " + _BLOCK),
    "creative_acr": ("answers written as YAML", "Write them into a column. " + _BLOCK),
}


def style_of(kind: str, conversation: str | None = None) -> Block | str | None:
    """Return the block of Axolotl's row type `kind`, or the name of ours that is the same; None for any other.

    `conversation`: the key beside `type: alpaca_chat`, which there names one of the four styles.
    """
    name = kind.removesuffix(".load")
    if name == "alpaca_chat" and conversation is not None:
        name = f"alpaca:{conversation}"
    if name in SAME_AS_OURS:
        return SAME_AS_OURS[name]
    if name.partition(":")[0] in ("summarizetldr",):  # it has one text in every style
        name = name.partition(":")[0]
    return STYLES.get(name)


def refusal_of(kind: str) -> tuple[str, str] | None:
    """Return the capability that a row type stands for, and what to write instead; None for one that is unknown."""
    found = [start for start in OTHERS if kind.startswith(start)]
    return OTHERS[max(found, key=len)] if found else None
