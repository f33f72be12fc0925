"""Advice for rows that lack a column which their `type` needs: the `type` to write in its place."""

import json

from finetuner.data.stanford_prompt import INTRO, INTRO_WITH_INPUT, TURN, TURN_WITH_INPUT
from finetuner.recipe.sections import DatasetEntry

# What instruction rows call their columns, the most telling first.
_INSTRUCTIONS = ("instruction", "question", "query", "prompt", "problem", "input")
_INPUTS = ("input", "context")
_OUTPUTS = ("output", "response", "completion", "answer", "target", "chosen_response", "solution", "label")


def column_advice(entry: DatasetEntry, columns: list[str]) -> str:
    """Return what to write in the recipe for rows with these columns, in full sentences."""
    lower = {name.lower(): name for name in columns}
    if any(name.startswith(("chosen", "rejected")) for name in lower):
        return "They look like pairs of preference learning (DPO), which is not supported yet."
    if entry.type in ("alpaca", "prompt_completion"):
        output = next((lower[name] for name in _OUTPUTS if name in lower), None)
        question = next((lower[name] for name in _INSTRUCTIONS if name in lower and lower[name] != output), None)
        if output is not None and question is not None:
            given = next((lower[name] for name in _INPUTS if name in lower and lower[name] != question), None)
            return _block(question, given, output, stanford=entry.type == "alpaca")
    for name in ("messages", "conversations"):
        if name in lower and entry.type != "chat_template":
            return f"They look like chats: `type: chat_template`, with `field_messages: {lower[name]}`."
    if entry.type == "chat_template":
        found = next((lower[name] for name in ("conversations", "conversation", "messages") if name in lower), None)
        if found is not None:
            return f"Write `field_messages: {found}`."
        if {"prompt", "completion"} <= set(lower):
            return "Write `type: prompt_completion`, which takes lists of messages too."
    return f"{entry.column_advice}, or choose the `type` that fits."


def _block(question: str, given: str | None, output: str, *, stanford: bool) -> str:
    """Return a `type` block to paste in the place of the type's name."""
    form, without = (INTRO_WITH_INPUT + "\n\n" + TURN_WITH_INPUT, INTRO + "\n\n" + TURN)
    if not stanford:
        form, without = "{instruction}{input}", "{instruction}"
    keys = {"field_instruction": question, "field_input": given, "field_output": output}
    keys |= {"format": None if given is None else form, "no_input_format": without}
    listed = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items() if value)
    return f"Name them in a `type` block in its place:\n    type: {{{listed}}}"
