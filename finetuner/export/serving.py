"""What else the tools want that serve a model: a Modelfile for Ollama, a folder that vLLM can open."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.errors import ModelError
from finetuner.models.files import weight_files
from finetuner.models.stop_tokens import stop_token_ids
from finetuner.storage.safetensors_stream import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
HOLDER = "\x00{}\x00"


@dataclass(frozen=True)
class Turns:
    """A chat template as what stands around each role's text, what stands before all, before all where no system turn
    begins, and before an answer."""

    before: str
    without_system: str
    around: dict[str, tuple[str, str]]
    answer: str

    def render(self, messages: list[dict[str, str]], *, asks: bool) -> str:
        text = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        before = self.before + ("" if messages[0]["role"] == "system" else self.without_system)
        return before + text + (self.answer if asks else "")


def turns_of(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """Raises ModelError for a template that does more than put text around each turn: Ollama's language is another."""
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template. Train with one (chat_template: ...), or export to gguf.")

    def rendered(messages: list[dict[str, str]], *, asks: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))

    dialog = [{"role": role, "content": HOLDER.format(i)} for i, role in enumerate((*ROLES, "user", "assistant"))]
    from jinja2 import TemplateError

    try:
        whole = rendered(dialog)
        ends = [whole.index(m["content"]) + len(m["content"]) for m in dialog]
        starts = [whole.index(m["content"]) for m in dialog]
        between = [whole[end:start] for end, start in zip(ends, starts[1:], strict=False)]
        head, tail = whole[: starts[0]], whole[ends[-1] :]
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
    """For `ollama create`: the weights, the template in Go's language, and where to stop."""
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
    """As a template's own string where it holds what the template or the Modelfile would take for theirs."""
    return f"{{{{ {json.dumps(text)} }}}}" if "{{" in text or '"' in text else text


def check_for_vllm(folder: Path) -> tuple[list[str], str]:
    """What was found good, and the command to serve it. Raises ModelError with all that is missing."""
    wrong, good = [], []
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"'{folder}' holds an adapter. Merge it first: python -m finetuner.merge {folder}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"'{folder}' is not a model folder: {error}") from error
    if not config.get("architectures"):
        wrong.append("config.json names no architectures")
    infos = [info for path in weight_files(folder) for info in read_header(path).values()]
    kinds = sorted({info.dtype for info in infos})
    good.append(f"weights: {len(infos)} tensors, {sum(info.num_bytes for info in infos) / 1e9:.2f} GB, {kinds}")
    if not (folder / "tokenizer_config.json").exists():
        wrong.append("there is no tokenizer")
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = config.get("text_config", config)
        if len(tokenizer) > text["vocab_size"]:
            wrong.append(f"the tokenizer has {len(tokenizer)} tokens, and the model rows for {text['vocab_size']}")
        has = "has a chat template" if tokenizer.chat_template else "has no chat template: completions only"
        good.append(f"tokenizer: {len(tokenizer):,} tokens, {has}")
    if wrong:
        raise ModelError(f"vLLM cannot serve '{folder}':\n" + "\n".join(f"  {one}" for one in wrong))
    length = config.get("text_config", config).get("max_position_embeddings")
    words = ["vllm serve", str(folder), *([f"--max-model-len {length}"] if length else [])]
    # vLLM computes fp32 weights in half precision unless told otherwise
    return good, " ".join([*words, *(["--dtype float32"] if kinds == ["F32"] else [])])
