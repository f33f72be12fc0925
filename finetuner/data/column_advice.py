"""Advice for rows that lack a column which their `type` needs: the `type` to write in its place."""

import json

from finetuner.data.stanford_prompt import INTRO, INTRO_WITH_INPUT, TURN, TURN_WITH_INPUT
from finetuner.recipe.sections import DatasetEntry

# What instruction rows call their columns, the most telling first.
_INSTRUCTIONS = (
    "instruction", "question", "query", "prompt", "problem", "input", "inputs", "text_input", "dialogue", "document",
    "article",
)  # fmt: skip
_INPUTS = ("input", "inputs", "context")
_OUTPUTS = (
    "output", "response", "completion", "answer", "target", "targets", "chosen_response", "solution",
    "generated_solution", "answers", "summary", "highlights", "label",
)  # fmt: skip
SYSTEM_COLUMNS = frozenset({
    "system", "system_prompt", "system_message", "system_text", "system_instruction", "sys_prompt", "definition",
})  # fmt: skip


def column_advice(entry: DatasetEntry, columns: list[str]) -> str:
    """Return what to write in the recipe for rows with these columns, in full sentences."""
    lower = {name.lower(): name for name in columns}
    if any(name.startswith(("chosen", "rejected", "preferred_", "non_preferred")) for name in lower):
        return "They look like pairs of preference learning (DPO), which is not supported yet."
    output = next((lower[name] for name in _OUTPUTS if name in lower), None)
    question = next((lower[name] for name in _INSTRUCTIONS if name in lower and lower[name] != output), None)
    given = next((lower[name] for name in _INPUTS if name in lower and lower[name] != question), None)
    system = next((name for key, name in lower.items() if key in SYSTEM_COLUMNS), None)
    is_pair = output is not None and question is not None
    if entry.type in ("alpaca", "prompt_completion") and is_pair and "tools" not in lower:
        return _block(question, given, output, system, stanford=entry.type == "alpaca")
    for name in ("messages", "conversations"):
        if name in lower and entry.type != "chat_template":
            return f"They look like chats: `type: chat_template`, with `field_messages: {lower[name]}`."
    if entry.type == "chat_template":
        found = next((lower[name] for name in ("conversations", "conversation", "messages") if name in lower), None)
        if found is not None:
            return f"Write `field_messages: {found}`."
        if {"prompt", "completion"} <= set(lower):
            return "Write `type: prompt_completion`, which takes lists of messages too."
    if entry.type in ("chat_template", "alpaca", "prompt_completion") and is_pair:
        chosen = {"instruction": question, "input": given, "output": output, "system": system}
        named = ", ".join(f"{key}: {json.dumps(name)}" for key, name in chosen.items() if name not in (None, key))
        beside = f" and `instruction_columns: {{{named}}}`" * bool(named)
        return f"For an instruction and its answer as a chat: `type: instruction_chat`{beside}."
    return f"{entry.column_advice}, or choose the `type` that fits."


def _block(question: str | None, given: str | None, output: str | None, system: str | None, *, stanford: bool) -> str:
    """Return a `type` block to paste in the place of the type's name."""
    form, without = (INTRO_WITH_INPUT + "\n\n" + TURN_WITH_INPUT, INTRO + "\n\n" + TURN)
    if not stanford:
        form, without = "{instruction}{input}", "{instruction}"
    keys = {"field_instruction": question, "field_input": given, "field_output": output}
    keys |= {"format": None if given is None else form, "no_input_format": without}
    if system is not None:
        keys |= {"field_system": system, "system_format": "{system}\n\n"}
    listed = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items() if value)
    return f"Name them in a `type` block in its place:\n    type: {{{listed}}}"
