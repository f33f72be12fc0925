"""Modelfile for Ollama: the weights, the chat template in Go's language, and where to stop.

The chat template is read by rendering it: what stands around each role's text is found, and the result is accepted only
if it renders some conversations as the template does.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuner.errors import ModelError
from finetuner.models.stop_tokens import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
HOLDER = "\x00{}\x00"


@dataclass(frozen=True)
class Turns:
    """A chat template as the texts around each turn."""

    before: str  # at the head of every conversation
    without_system: str  # after it, where no system turn begins
    around: dict[str, tuple[str, str]]  # role -> the texts before and after its content
    answer: str  # before an answer that is asked for

    def render(self, messages: list[dict[str, str]], *, asks: bool) -> str:
        """Render a conversation as the template would. `asks`: an answer is to follow."""
        text = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        before = self.before + ("" if messages[0]["role"] == "system" else self.without_system)
        return before + text + (self.answer if asks else "")


def turns_of(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """Find the texts around each turn.

    Raises ModelError for a template that does more than put text around each turn: Ollama's language is another."""
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template. Train with one (chat_template: ...), or export to gguf.")

    def rendered(messages: list[dict[str, str]], *, asks: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))

    dialog = [{"role": role, "content": HOLDER.format(i)} for i, role in enumerate((*ROLES, "user", "assistant"))]
    from jinja2 import TemplateError

    try:
        full = rendered(dialog)
        ends = [full.index(m["content"]) + len(m["content"]) for m in dialog]
        starts = [full.index(m["content"]) for m in dialog]
        between = [full[end:start] for end, start in zip(ends, starts[1:], strict=False)]
        head, tail = full[: starts[0]], full[ends[-1] :]
        # between = what ends a turn + what begins the next: the tail is what ends an answer
        user_begins = between[2].removeprefix(tail)
        user_ends = rendered(dialog[:2]).partition(dialog[1]["content"])[2]
        assistant_begins = between[1].removeprefix(user_ends)
        system_ends = between[0].removesuffix(user_begins)
        opening = rendered(dialog[1:2]).partition(dialog[1]["content"])[0].removesuffix(user_begins)
        always = opening if head.startswith(opening) else ""
        around = {
            "system": (head.removeprefix(always), system_ends),
            "user": (user_begins, user_ends),
            "assistant": (assistant_begins, tail),
        }
        asked = rendered(dialog[:2], asks=True)
        turns = Turns(always, opening.removeprefix(always), around, asked.removeprefix(rendered(dialog[:2])))
        probes = [(dialog, False), (dialog[:4], True), (dialog[1:4], True), (dialog[1:2], True)]
        if all(turns.render(messages, asks=asks) == rendered(messages, asks=asks) for messages, asks in probes):
            return turns
    except (TemplateError, ValueError, TypeError):
        pass
    raise ModelError(
        "the chat template does more than put text around each turn, which a Modelfile cannot say. Export to gguf (the "
        "file carries the template as it is), and serve it with llama.cpp: llama-server --jinja -m FILE"
    )


def modelfile(gguf_name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the Modelfile for `ollama create`. Raises ModelError if the chat template cannot be written in it."""
    turns = turns_of(tokenizer)
    branches = "".join(
        f"{{{{ {'if' if i == 0 else 'else if'} eq .Role {json.dumps(role)} }}}}"
        f"{_quoted(turns.around[role][0])}{{{{ .Content }}}}{_quoted(turns.around[role][1])}"
        for i, role in enumerate(ROLES)
    )
    opening = _quoted(turns.before)
    if turns.without_system:
        opening += f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_quoted(turns.without_system)}{{{{ end }}}}'
    template = f"{opening}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
    stops: Any = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}{_quoted(turns.answer)}"""']
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops)]) + "\n"


def _quoted(text: str) -> str:
    """Quote text that holds what the template or the Modelfile would take for theirs; else return it."""
    return f"{{{{ {json.dumps(text)} }}}}" if "{{" in text or '"' in text else text
