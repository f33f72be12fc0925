"""Render conversations with a chat template, and find which characters are trained on.

A conversation is rendered once, and compared with what the template writes around stand-ins for its texts, which is
remembered for conversations of the same shape. One with tool calls has a shape of its own, and is rendered twice.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from finetuner.data.answer_spans import AnswerFinder
from finetuner.data.formats.base import Rendered, Span
from finetuner.data.messages import Conversation, Messages
from finetuner.data.template_outline import Outline, TurnPlan, require_no_role_left_out
from finetuner.data.template_sandbox import THOUGHT_ENDS, THOUGHT_NAMES, ChatTemplate, compile_template
from finetuner.data.template_spans import (
    THOUGHT_KEY,
    StandIns,
    choose_prefix,
    find_token_like_values,
    locate_texts,
    put_stand_ins,
)
from finetuner.data.tool_arguments import CallForms
from finetuner.data.turn_endings import TurnEndings
from finetuner.errors import DataError
from finetuner.recipe.sections.datasets import Ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CACHED_OUTLINES = 2048
# Variables by which public templates let a caller have thoughts written.
_SWITCHES = ("enable_thinking", "preserve_thinking", "keep_thinking", "clear_thinking", "truncate_history_thinking")


class _Program:
    """A compiled template with all that was found out about it."""

    def __init__(self, template: ChatTemplate, endings: TurnEndings) -> None:
        self.template, self.finder = template, AnswerFinder(template, endings)
        self.outlines: dict[Hashable, Outline] = {}
        self._forms: CallForms | None = None

    def with_calls_as_taken(self, messages: Messages) -> Messages:
        """Return the messages with their tool calls in the form that the template takes. Raises DataError."""
        if not any("tool_calls" in message for message in messages):
            return messages
        if self._forms is None:
            self._forms = CallForms.of(self.template)
        return self._forms.convert(messages)

    def outline(self, messages: Messages, tools: list[Any] | None, *, keeps_blank: bool) -> tuple[StandIns, Outline]:
        """Return stand-ins for messages, and the outline of messages like them. Raises DataError."""
        stand_ins = put_stand_ins(self.template, messages, choose_prefix(messages), keeps_blank=keeps_blank)
        if tools is None and all(len(message) == 2 for message in messages):  # a role and a text, as nearly all are
            key: Hashable = (
                stand_ins.prefix,
                *[(message["role"], message["content"]) for message in stand_ins.messages],
            )
        else:
            key = json.dumps([stand_ins.messages, tools], default=repr)
        if "strftime_now" in self.template.text:
            key = (key, date.today())
        if key not in self.outlines:
            if len(self.outlines) >= MAX_CACHED_OUTLINES:
                self.outlines.clear()
            self.outlines[key] = self.finder.find(stand_ins, tools)
        return stand_ins, self.outlines[key]


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer's chat template with the rules of what is trained on.

    `only_answers`: answers and the ends of their turns are trained on, as {% generation %} markers in a template have
    it. `kwargs`: further variables of the template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    endings: TurnEndings
    kwargs: Mapping[str, Any]
    only_answers: bool
    _programs: dict[str, _Program] = field(default_factory=dict)

    def render(self, conversation: Conversation) -> Rendered:
        """Return the text of a conversation and its trained spans.

        Raises DataError if the template refuses the conversation or leaves a part of it out, or it cannot be told which
        text is the template's and which is a message's.
        """
        program = self._program(conversation.tools)
        _require_understood(conversation, program.template)
        conversation = replace(conversation, messages=program.with_calls_as_taken(conversation.messages))
        is_by_role = all(
            is_trained == (message["role"] == "assistant")
            for is_trained, message in zip(conversation.trained, conversation.messages, strict=True)
        )
        if program.template.marks_answers and self.only_answers and is_by_role:
            rendered = self._render_marked(program, conversation)
        else:
            rendered = self._render_unmarked(program, conversation)
        return self._with_tool_contents(rendered, conversation.tools)

    def _with_tool_contents(self, rendered: Rendered, tools: list[Any] | None) -> Rendered:
        """Return the rendering with token-like values of the row's tools among its contents, which are words.

        A value that is a token and nothing more cannot be told from the template's own, and is left as it is.
        """
        if not tools:
            return rendered
        tokens, text = self.endings.tokens, rendered.text
        found = find_token_like_values(tools, text, (0, len(text)), tokens)
        values = {(start, stop) for start, stop in found if text[start:stop] not in tokens}
        return replace(rendered, contents=tuple(sorted({*rendered.contents, *values}))) if values else rendered

    def _program(self, tools: list[Any] | None) -> _Program:
        """Return the tokenizer's template, or, if it has several, the one for tools."""
        text = str(self.tokenizer.get_chat_template(tools=tools))
        if text not in self._programs:
            template = compile_template(text, {**self.tokenizer.special_tokens_map, **self.kwargs})
            self._programs[text] = _Program(template, self.endings)
        return self._programs[text]

    def _render_marked(self, program: _Program, conversation: Conversation) -> Rendered:
        """Render with a template that marks the answers itself."""
        messages = conversation.messages
        text, spans = program.template.render_marked(messages, conversation.tools)
        spans = [(start, stop) for start, stop in spans if start < stop]
        if any(conversation.trained) and not spans:
            raise DataError("the chat template marks no answer of this conversation with {% generation %}")
        try:
            outline, contents = _locate(program, conversation, text)
        except DataError:  # the template rewrites messages, which its marks allow, but leaves none out
            require_no_role_left_out(program.template, messages, conversation.tools)
            return Rendered(text, tuple(spans), wraps=False)
        left_out = self._left_out_thoughts(program.template, conversation, outline)
        return Rendered(text, tuple(spans), wraps=False, contents=contents, left_out_thoughts=left_out)

    def _render_unmarked(self, program: _Program, conversation: Conversation) -> Rendered:
        """Find the trained spans: of each answer what stands behind the prompt for it, to the end of its turn."""
        text = program.template.render(conversation.messages, conversation.tools)
        outline, contents = _locate(program, conversation, text)
        left_out = self._left_out_thoughts(program.template, conversation, outline)
        text, spans = self._trained_spans(conversation.trained, outline.turns, contents, text)
        if not conversation.plain:
            calls = {
                span
                for message, turn in zip(conversation.messages, outline.turns, strict=True)
                for start, stop in turn.segments
                for span in find_token_like_values(
                    message.get("tool_calls"), text, (start.place(contents), stop.place(contents)), self.endings.tokens
                )
            }
            contents = tuple(sorted({*contents, *calls}))
        return Rendered(text, spans, wraps=False, contents=contents, left_out_thoughts=left_out)

    def _trained_spans(
        self, trained: tuple[bool, ...], turns: tuple[TurnPlan, ...], pieces: tuple[Span, ...], text: str
    ) -> tuple[str, tuple[Span, ...]]:
        """Return the text, and the spans of the turns that are trained on and of the endings that the rules train on.

        An ending that the template would write with the next turn alone is added to the text. Raises DataError if a
        trained turn has no ending although its ending is to be trained on, or has nothing in it.
        """
        last = max((i for i, is_trained in enumerate(trained) if is_trained), default=-1)
        spans: list[Span] = []
        for i, turn in enumerate(turns):
            if trained[i] and turn.problem:
                raise DataError(turn.problem)
            if not turn.segments:
                continue
            is_required = self.endings.is_required(turn.ending, is_trained=trained[i], is_last=i == last)
            if is_required and turn.no_ending:
                raise DataError(turn.no_ending)
            bodies = [(start.place(pieces), stop.place(pieces)) for start, stop in turn.segments]
            stop = bodies[-1][1]
            if not trained[i]:
                bodies = [(stop, stop)]
            if is_required or (self.endings.policy(turn.ending) == "all" and not turn.added):
                text += turn.ending if turn.added else ""
                bodies[-1] = bodies[-1][0], stop + len(turn.ending)
            bodies = [(a, b) for a, b in bodies if a < b]
            if trained[i] and not bodies:
                raise DataError(f"message {i} is to be trained on, but it is empty and its end is not trained on")
            spans += bodies
        return text, tuple(sorted(spans))

    def _left_out_thoughts(self, template: ChatTemplate, conversation: Conversation, outline: Outline) -> int:
        """Return how many thoughts the template leaves out.

        Raises DataError if they are those of the trained answers to the last question, and none of these is written.
        """
        if not outline.left_out:
            return 0
        messages = conversation.messages
        question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        in_hand = [i for i in outline.left_out if i > question and conversation.trained[i]]
        written = {piece.turn for piece in outline.written.pieces if piece.kind == "t" and piece.turn > question}
        if in_hand and not written:
            raise DataError(_left_out_message(conversation, in_hand[-1], template))
        return len(outline.left_out)


def _locate(program: _Program, conversation: Conversation, text: str) -> tuple[Outline, tuple[Span, ...]]:
    """Return the outline of a rendered conversation, and where the pieces of the outline stand in its text.

    Raises DataError if the template leaves a message out or changes it.
    """
    messages, tools = conversation.messages, conversation.tools
    try:
        stand_ins, outline = program.outline(messages, tools, keeps_blank=False)
        return outline, locate_texts(text, outline.written, stand_ins.texts)
    except DataError:
        if all((message["content"] or "").strip() for message in messages):
            raise
    # a template may write less around an empty text than around another
    stand_ins, outline = program.outline(messages, tools, keeps_blank=True)
    return outline, locate_texts(text, outline.written, stand_ins.texts)


def _require_understood(conversation: Conversation, template: ChatTemplate) -> None:
    """Raise DataError if a template does not know of the row's tools or thoughts: it would silently omit them."""
    advice = (
        "so the row's would be left out. Take a tokenizer whose template does, or name one with `chat_template` or "
        "`chat_template_jinja`"
    )
    has = set().union(*conversation.messages, ["tools"] if conversation.tools else [])
    for key in ("tools", "tool_calls"):
        if key in has and key not in template.text:
            raise DataError(f"the chat template does not write {key}, {advice}")
    if THOUGHT_KEY in has and not template.thought_names:
        raise DataError(
            f"the chat template does not write the thoughts of messages (it reads none of {', '.join(THOUGHT_NAMES)}), "
            + advice
        )


def _left_out_message(conversation: Conversation, turn: int, template: ChatTemplate) -> str:
    """Return the error for a template that does not write the thought of the answer in hand."""
    switch = _find_switch(conversation, turn, template)
    advice = f"Switch it on (`chat_template_kwargs: {{{switch}}}`), take" if switch else "Take"
    return (
        f"the chat template leaves out the thought of message {turn}, an answer to the last question: the model would "
        f"learn to answer without it. {advice} a template that writes it (`chat_template_jinja: FILE`), or take the "
        "thoughts out of the rows, if answers without them are meant"
    )


def _find_switch(conversation: Conversation, turn: int, template: ChatTemplate) -> str:
    """Return a variable of the template with which it writes a thought ("enable_thinking: true"); "" if none does."""
    message = conversation.messages[turn]
    thought = message.get(THOUGHT_KEY) or (message["content"] or "").split(THOUGHT_ENDS)[0].split("<think>")[-1]
    for name in _SWITCHES:
        for value in (True, False) if name in template.text else ():
            switched = compile_template(template.text, {**template.variables, name: value})
            try:
                if thought.strip() in switched.render(conversation.messages, conversation.tools):
                    return f"{name}: {str(value).lower()}"
            except DataError:
                continue
    return ""


def build_chat_renderer(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    kwargs: Mapping[str, Any],
    eot_tokens: tuple[str, ...] | None,
    train_on_eos: Ends,
    train_on_eot: Ends | None,
) -> ChatRenderer:
    """Return the renderer of a tokenizer's chat template.

    Raises DataError if the tokenizer has no chat template, or an eot token is not a single token of it.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which `type: chat_template` needs. Take "
            "the instruct model's tokenizer (`tokenizer: NAME`), or name one (`chat_template: chatml`)"
        )
    eos: Any = tokenizer.eos_token
    for token in eot_tokens or ():
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise DataError(
                f"eot_tokens: '{token}' is {len(ids)} tokens to this tokenizer. Add it as one: `tokens: ['{token}']`"
            )
    added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    endings = TurnEndings(
        tokens=added if eot_tokens is None else tuple({*eot_tokens, *([eos] if eos else [])}),
        named=eot_tokens or (),
        added=added,
        eos=eos,
        of_text=train_on_eos,
        of_turn=train_on_eot or train_on_eos,
    )
    return ChatRenderer(
        tokenizer,
        endings,
        dict(kwargs),
        only_answers=train_on_eos == endings.of_turn == "turn" and eot_tokens is None,
    )
