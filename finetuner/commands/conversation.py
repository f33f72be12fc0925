"""A conversation with a model through its chat template, answers written as they come."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetuner.commands.text_model import SamplingOptions, TextModel, load_text_model
from finetuner.data.template_sandbox import ChatTemplate, compile_template
from finetuner.errors import DataError, ModelError
from finetuner.models.context_length import context_length
from finetuner.models.generation import draw_token, generate_tokens, stream_text
from finetuner.models.stop_tokens import stop_token_ids

Write = Callable[[str], None]
CHAT_COMMANDS = "/reset forgets the conversation, /system TEXT begins one with that instruction, /quit ends"
_CONTEXT_OF_DECODER = 32  # tokens before an answer: how its first characters are written depends on them


@dataclass(frozen=True)
class ChatHistory:
    """Turns so far: the instruction at the head, if there is one, and questions with answers."""

    system: str = ""
    turns: tuple[dict[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """All turns, the instruction first, as the chat template takes them."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def with_question(self, question: str) -> "ChatHistory":
        """Append a turn of the user."""
        return ChatHistory(self.system, (*self.turns, {"role": "user", "content": question}))

    def with_answer(self, answer: str) -> "ChatHistory":
        """Append a turn of the model."""
        return ChatHistory(self.system, (*self.turns, {"role": "assistant", "content": answer}))

    def without_oldest(self) -> "ChatHistory":
        """Leave out the first question and its answer."""
        return ChatHistory(self.system, self.turns[2:])


@dataclass(frozen=True)
class ChatSession:
    """A loaded model that answers. `write` takes the model's text; `remark` takes lines about the conversation."""

    speaker: TextModel
    template: ChatTemplate
    options: SamplingOptions
    generator: torch.Generator
    write: Write
    remark: Write

    def answer(self, conversation: ChatHistory) -> ChatHistory:
        """Write the answer to the last question as it comes, and return the conversation with both.

        Oldest questions are left out where the context has no room for them. Raises DataError if the template refuses
        the conversation, or the last question alone is too long. Ctrl-C ends the answer, not the conversation.
        """
        model, tokenizer = self.speaker.model, self.speaker.tokenizer
        context, options = context_length(model), self.options
        conversation, ids = self._fitted(conversation, context)
        count = options.max_new_tokens if context is None else min(options.max_new_tokens, context - len(ids))
        choice = partial(draw_token, temperature=options.temperature, top_p=options.top_p, generator=self.generator)
        stops = stop_token_ids(tokenizer, model.generation_config)
        tokens = generate_tokens(model, ids, count=count, choice=choice, stops=stops, context=context)
        pieces: list[str] = []
        try:
            for text in stream_text(tokenizer, ids[-_CONTEXT_OF_DECODER:], tokens):
                pieces.append(text)
                self.write(text)
        except KeyboardInterrupt:
            self.remark("(stopped)")
        self.write("\n")
        return conversation.with_answer("".join(pieces))

    def _fitted(self, conversation: ChatHistory, context: int | None) -> tuple[ChatHistory, list[int]]:
        """Drop oldest turns until the context has room for an answer; return what is left, and its token ids."""
        ids, left_out = self._token_ids(conversation), 0
        if context is None:
            return conversation, ids
        room = context - min(self.options.max_new_tokens, context // 2)
        while len(ids) > room and len(conversation.turns) > 1:
            conversation, left_out = conversation.without_oldest(), left_out + 1
            ids = self._token_ids(conversation)
        if len(ids) > room:
            raise DataError(
                f"that is {len(ids):,} tokens, and the model has a context of {context:,}, of which "
                f"{context - room:,} are for the answer. Say it shorter, or give a smaller --max-new-tokens."
            )
        if left_out:
            what = "question and its answer are" if left_out == 1 else f"{left_out} questions and their answers are"
            self.remark(f"(the context of {context:,} tokens is full: the oldest {what} forgotten)")
        return conversation, ids

    def _token_ids(self, conversation: ChatHistory) -> list[int]:
        text = self.template.render(conversation.messages, None, prompt=True)
        # The template writes the token that begins a text; the tokenizer must not write it again.
        ids: list[int] = self.speaker.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def hold_conversation(
    source: str,
    overrides: list[str],
    system: str,
    options: SamplingOptions,
    lines: Callable[[], Iterable[str]],
    write: Write,
    remark: Write,
) -> None:
    """Answer each of the `lines`, which are asked for when the model is loaded, until they end or one is /quit.

    Raises FinetunerError if there is no such model, or it has no chat template."""
    speaker = load_text_model(source, overrides)
    template, generator = template_of(speaker, source), torch.Generator().manual_seed(options.seed)
    session = ChatSession(speaker, template, options, generator, write, remark)
    remark(f"({CHAT_COMMANDS})")
    conversation = ChatHistory(system)
    for line in _not_blank(lines()):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation = ChatHistory(conversation.system)
            remark("(the conversation begins again)")
        elif command == "/system":
            conversation = ChatHistory(rest.strip())
            remark(
                "(a new conversation, with that instruction)"
                if conversation.system
                else "(a new one, without instruction)"
            )
        elif line.startswith("/"):
            remark(f"there is no command '{command}': {CHAT_COMMANDS}. A blank before the / makes it text.")
        else:
            try:
                conversation = session.answer(conversation.with_question(line.strip()))
            except DataError as error:
                remark(str(error))


def _not_blank(lines: Iterable[str]) -> Iterator[str]:
    return (line.rstrip() for line in lines if line.strip())


def template_of(speaker: TextModel, source: str) -> ChatTemplate:
    """Compile the tokenizer's chat template. Raises ModelError if it has none."""
    tokenizer: Any = speaker.tokenizer
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of '{source}' has no chat template: it was not taught to answer in turns. To let it go on "
            f'with a text:\n  finetuner generate {source} --prompt "..."\n'
            "Or train it on conversations, with a template (`chat_template: chatml`)."
        )
    known = {**tokenizer.special_tokens_map, **speaker.template_values}
    return compile_template(str(tokenizer.get_chat_template()), known)
