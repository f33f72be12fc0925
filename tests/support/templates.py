"""Conversations, contents that templates stumble over, and what is trained on of a row, as text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData
from finetuner.data.token_store import IGNORE_INDEX
from finetuner.recipe.sections import DataSection
from support.places import SHARED_DATA
from support.rows import write_rows

EOS, BOS = "<|endoftext|>", "<|bos|>"

# name -> what an answer begins with that is not in the prompt, what ends it, whether contents are trimmed
NAMED: dict[str, tuple[str, str, bool]] = {
    "alpaca": ("", EOS, False),
    "aya": ("", "<|END_OF_TURN_TOKEN|>", True),
    "chatml": ("", "<|im_end|>", False),
    "cohere": ("", "<|END_OF_TURN_TOKEN|>", True),
    "command_a": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", False),
    "deepseek_v2": ("", EOS, False),
    "deepseek_v3": ("", EOS, False),
    "exaone": ("", "[|endofturn|]", False),
    "exaone4": ("", "[|endofturn|]", False),
    "falcon_h1": ("", "<|im_end|>", False),
    "gemma": ("", "<end_of_turn>", True),
    "gemma3": ("", "<end_of_turn>", True),
    "gemma3n": ("", "<end_of_turn>", True),
    "gemma4": ("", "<turn|>", True),
    "granite": ("", "<|end_of_text|>", False),
    "jamba": (" ", "<|eom|>", False),
    "llama3": ("", "<|eot_id|>", True),
    "llama3_2_vision": ("", "<|eot_id|>", True),
    "llama4": ("", "<|eot|>", False),
    "metharme": ("", EOS, True),
    "mistral_v1": (" ", EOS, False),
    "mistral_v2v3": (" ", EOS, False),
    "mistral_v3_tekken": ("", EOS, False),
    "mistral_v7_tekken": ("", EOS, False),
    "olmo": ("", EOS, False),
    "phi_3": ("", "<|end|>", False),
    "phi_35": ("", "<|end|>", False),
    "phi_4": ("", "<|im_end|>", False),
    "qwen2_vl": ("", "<|im_end|>", False),
    "qwen3": ("", "<|im_end|>", False),
    "qwen3_5": ("", "<|im_end|>", False),
    "qwen_25": ("", "<|im_end|>", False),
    "smollm": ("", "<|im_end|>", False),
    "tulu": ("", EOS, False),
    "zephyr": ("", EOS, False),
}
# The model has to write that it does not think: it stands behind the prompt, in the answer to the last question.
UNTHOUGHT = {"qwen3": "<think>\n\n</think>\n\n", "qwen3_5": "\n</think>\n\n"}
# Begin-of-text is the family's to write, and these write none, or write it as a word of their own.
WITHOUT_BOS = {
    "chatml", "exaone", "exaone4", "granite", "jamba", "phi_3", "phi_35", "phi_4", "qwen2_vl", "qwen3", "qwen3_5",
    "qwen_25", "smollm", "tulu", "zephyr",
}  # fmt: skip
ENDS = sorted({end for _, end, _ in NAMED.values()} - {EOS, "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"})

CONTENTS = [
    "plain",
    "[[1, 2], [3, 4]]",
    "assistant",
    "<|im_start|>assistant",
    "<|im_end|>\n<|im_start|>user\n<|im_end|>",
    "[INST] a [/INST]",
    "",
    " ",
    "  two before",
    "two after  ",
    "\nline before",
    "\n\n\n",
    "line after\n",
    " \t mixed \r\n",
    "one\r\ntwo\r\n",
    "🦊 naïve ﷽ 中文",
    "q0x0z",
    "q0x1zq1x0z",
    "{{ messages }} {% raw %}",
    "\\n \\0 \0",
    "<think>so</think>\n\nthus",
]


def learn(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], folder: Path, **keys: Any) -> PreparedData:
    """What training sees of the rows, written to a file and read as a recipe would have them read."""
    path = write_rows(folder / "rows.jsonl", rows)
    kind = "chat_template" if "messages" in rows[0] else "alpaca"
    values = {"datasets": [{"path": str(path), "type": kind}], "sequence_len": 100_000} | keys
    return prepare_documents(DataSection.model_validate(values), tokenizer, seed=0)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Text of the ids, as it stands behind other text: SentencePiece drops a space at the very beginning."""
    text = tokenizer.decode(
        [tokenizer.eos_token_id, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text.removeprefix(tokenizer.eos_token)


def trained_texts(tokenizer: PreTrainedTokenizerBase, ids: Any, labels: Any) -> list[str]:
    """Each unbroken run of trained tokens, as text."""
    trained = labels != IGNORE_INDEX
    assert (labels[trained] == ids[trained]).all()
    borders = np.flatnonzero(np.diff(trained, prepend=False, append=False))
    return [decoded(tokenizer, ids[a:b]) for a, b in borders.reshape(-1, 2)]


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + turns}


def real_file(name: str) -> Path:
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"{SHARED_DATA / name} is not on this machine")
    return SHARED_DATA / name
