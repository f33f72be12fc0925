"""`finetuner chat`: a conversation with a model through its chat template, answers shown as they come."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetuner.commands.generate import Manner, Speaker, speaker_of
from finetuner.data.template_sandbox import ChatTemplate, compile_template
from finetuner.errors import DataError, ModelError
from finetuner.models.generation import as_text, choose, context_of, ends_of, sampled
from finetuner.models.generation_config import stop_ids

Write = Callable[[str], None]
COMMANDS = "/reset forgets the conversation, /system TEXT begins one with that instruction, /quit ends"
_KNOWN_TO_DECODER = 32  # tokens before an answer: how its first characters are written depends on them


@dataclass(frozen=True)
class Said:
    """A conversation between two turns: the instruction at its head, if there is one, and questions with answers."""

    system: str = ""
    turns: tuple[dict[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def asked(self, question: str) -> "Said":
        return Said(self.system, (*self.turns, {"role": "user", "content": question}))

    def answered(self, answer: str) -> "Said":
        return Said(self.system, (*self.turns, {"role": "assistant", "content": answer}))

    def without_oldest(self) -> "Said":
        """The first question and its answer left out."""
        return Said(self.system, self.turns[2:])


@dataclass(frozen=True)
class Chatter:
    """A model that answers. `say` gets what is not the model's: one line at a time."""

    speaker: Speaker
    template: ChatTemplate
    manner: Manner
    generator: torch.Generator
    write: Write
    say: Write

    def answer(self, said: Said) -> Said:
        """Write the answer to the last question as it comes, and return the conversation with both.

        What the context has no room for is left out, oldest questions first. Raises DataError if the template refuses
        the conversation, or the last question alone is too long. Ctrl-C ends the answer, not the conversation.
        """
        model, tokenizer = self.speaker.model, self.speaker.tokenizer
        context = context_of(model)
        said, ids = self._fitted(said, context)
        count = self.manner.count if context is None else min(self.manner.count, context - len(ids))
        choice = partial(choose, temperature=self.manner.temperature, top_p=self.manner.top_p, generator=self.generator)
        ends = ends_of(model, tokenizer) | set(stop_ids(tokenizer))
        tokens = sampled(model, ids, count=count, choice=choice, ends=ends, context=context)
        parts: list[str] = []
        try:
            for text in as_text(tokenizer, ids[-_KNOWN_TO_DECODER:], tokens):
                parts.append(text)
                self.write(text)
        except KeyboardInterrupt:
            self.say("(stopped)")
        self.write("\n")
        return said.answered("".join(parts))

    def _fitted(self, said: Said, context: int | None) -> tuple[Said, list[int]]:
        """What fits beside an answer, and its tokens."""
        ids, left_out = self._tokens(said), 0
        if context is None:
            return said, ids
        room = context - min(self.manner.count, context // 2)
        while len(ids) > room and len(said.turns) > 1:
            said, left_out = said.without_oldest(), left_out + 1
            ids = self._tokens(said)
        if len(ids) > room:
            raise DataError(
                f"that is {len(ids):,} tokens, and the model has a context of {context:,}, of which "
                f"{context - room:,} are for the answer. Say it shorter, or give a smaller --max-new-tokens."
            )
        if left_out:
            what = "question and its answer are" if left_out == 1 else f"{left_out} questions and their answers are"
            self.say(f"(the context of {context:,} tokens is full: the oldest {what} forgotten)")
        return said, ids

    def _tokens(self, said: Said) -> list[int]:
        text = self.template.render(said.messages, None, prompt=True)
        # The template writes the token that begins a text; the tokenizer must not write it again.
        ids: list[int] = self.speaker.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def chat(
    source: str,
    overrides: list[str],
    system: str,
    manner: Manner,
    lines: Callable[[], Iterable[str]],
    write: Write,
    say: Write,
) -> None:
    """Answer each of the `lines`, which are asked for when the model is loaded, until they end or one is /quit.

    Raises FinetunerError if there is no such model, or it has no chat template."""
    speaker = speaker_of(source, overrides)
    chatter = Chatter(
        speaker, template_of(speaker, source), manner, torch.Generator().manual_seed(manner.seed), write, say
    )
    say(f"({COMMANDS})")
    said = Said(system)
    for line in _texts(lines()):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            said = Said(said.system)
            say("(the conversation begins anew)")
        elif command == "/system":
            said = Said(rest.strip())
            say("(a new conversation, with that instruction)" if said.system else "(a new one, without instruction)")
        elif line.startswith("/"):
            say(f"there is no command '{command}': {COMMANDS}. A blank before the / makes it text.")
        else:
            try:
                said = chatter.answer(said.asked(line.strip()))
            except DataError as error:
                say(str(error))


def _texts(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.strip():
            yield line.rstrip()


def template_of(speaker: Speaker, source: str) -> ChatTemplate:
    """Raises ModelError if the tokenizer has none."""
    tokenizer: Any = speaker.tokenizer
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of '{source}' has no chat template: it was not taught to answer in turns. To let it go on "
            f'with a text:\n  finetuner generate {source} --prompt "..."\n'
            "Or train it on conversations, with a template (`chat_template: chatml`)."
        )
    known = {**tokenizer.special_tokens_map, **speaker.template_values}
    return compile_template(str(tokenizer.get_chat_template()), known)
