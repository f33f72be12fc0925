"""Render conversations with a chat template, and find which characters are trained on.

A conversation is rendered once, and compared with what the template writes around stand-ins for its texts, which is
remembered for conversations of the same shape. One with tool calls has a shape of its own, and is rendered twice.
"""

import itertools
import json
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from finetuner.data.answer_spans import AnswerFinder
from finetuner.data.formats.base import Rendered, Span
from finetuner.data.messages import Conversation
from finetuner.data.template_outline import Outline, TurnPlan, require_none_left_out
from finetuner.data.template_sandbox import THOUGHT_ENDS, THOUGHT_NAMES, ChatTemplate, compile_template
from finetuner.data.template_spans import (
    THOUGHT_BEGINS,
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
_SWITCHES = (
    "enable_thinking", "preserve_thinking", "keep_thinking", "clear_thinking", "truncate_history_thinking",
    "skip_think", "thinking",
)  # fmt: skip


class _Program:
    """A compiled template with all that was found out about it."""

    def __init__(self, template: ChatTemplate, endings: TurnEndings) -> None:
        self.template, self.finder = template, AnswerFinder(template, endings)
        self.outlines: dict[Hashable, Outline] = {}
        self._writes_date = "strftime_now" in template.text
        self._forms: CallForms | None = None
        self._switch: str | None = None

    def with_calls_as_taken(self, conversation: Conversation) -> Conversation:
        """Return the conversation with its tool calls in the form that the template takes. Raises DataError."""
        if not any("tool_calls" in message for message in conversation.messages):
            return conversation
        if self._forms is None:
            self._forms = CallForms.of(self.template)
        return replace(conversation, messages=self._forms.convert(conversation.messages))

    def outline(self, conversation: Conversation, *, keeps_blank: bool = False) -> tuple[Outline, list[str]]:
        """Return the outline of conversations like this one, and the texts of its pieces in this one. Raises DataError.

        `keeps_blank`: as in `put_stand_ins`.
        """
        messages, prefix = conversation.messages, choose_prefix(conversation.messages)
        key: Hashable
        if self._is_plain(conversation) and not keeps_blank:  # as nearly all are: the roles are all that matters
            key = self._at_date((prefix, *[message["role"] for message in messages]))
            outline = self.outlines.get(key)
            if outline is None:
                outline = self._add(key, put_stand_ins(self.template, messages, prefix), None)
            return outline, [messages[piece.turn]["content"] for piece in outline.written.pieces]
        stand_ins = put_stand_ins(self.template, messages, prefix, keeps_blank=keeps_blank)
        key = self._at_date(json.dumps([stand_ins.messages, conversation.tools], default=repr))
        outline = self.outlines.get(key) or self._add(key, stand_ins, conversation.tools)
        return outline, [stand_ins.texts[piece] for piece in outline.written.pieces]

    def find_switch(self, conversation: Conversation, turn: int) -> str:
        """Return a variable of the template with which it writes a thought ("enable_thinking: true"); "" if none does.

        Found for the first such conversation.
        """
        if self._switch is None:
            message, template = conversation.messages[turn], self.template
            thought = message.get(THOUGHT_KEY) or message["content"].split(THOUGHT_ENDS)[0].split(THOUGHT_BEGINS)[-1]
            self._switch = ""
            for name, value in itertools.product(_SWITCHES, (False, True)):
                switched = compile_template(template.text, {**template.variables, name: value})
                with suppress(DataError):
                    if thought.strip() in switched.render(conversation.messages, conversation.tools):
                        self._switch = f"{name}: {str(value).lower()}"
        return self._switch

    def _is_plain(self, conversation: Conversation) -> bool:
        """Return whether messages are a role and a text without a thought in it, and nothing more."""
        messages = conversation.messages
        if conversation.tools is not None or not all(len(message) == 2 for message in messages):
            return False
        looks = self.template.looks_for_thoughts_in_text
        return not looks or not any(THOUGHT_ENDS in message["content"] for message in messages)

    def _at_date(self, key: Hashable) -> Hashable:
        return (key, date.today()) if self._writes_date else key

    def _add(self, key: Hashable, stand_ins: StandIns, tools: list[Any] | None) -> Outline:
        if len(self.outlines) >= MAX_CACHED_OUTLINES:
            self.outlines.clear()
        self.outlines[key] = self.finder.find(stand_ins, tools)
        return self.outlines[key]


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
        if not conversation.plain or conversation.tools:
            _require_understood(conversation, program.template)
            conversation = program.with_calls_as_taken(conversation)
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
            require_none_left_out(program.template, messages, conversation.tools)
            return Rendered(text, tuple(spans), wraps=False)
        left_out = self._left_out_thoughts(program, conversation, outline)
        return Rendered(text, tuple(spans), wraps=False, contents=contents, left_out_thoughts=left_out)

    def _render_unmarked(self, program: _Program, conversation: Conversation) -> Rendered:
        """Find the trained spans: of each answer what stands behind the prompt for it, to the end of its turn."""
        text = program.template.render(conversation.messages, conversation.tools)
        outline, contents = _locate(program, conversation, text)
        left_out = self._left_out_thoughts(program, conversation, outline)
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
        all_ends = "all" in (self.endings.of_text, self.endings.of_turn)
        spans: list[Span] = []
        for i, turn in enumerate(turns):
            if trained[i]:
                added, bodies = self._trained_span(i, turn, pieces, is_last=i == last)
                text += added
                spans += bodies
            elif all_ends and turn.ending and not turn.added and self.endings.policy(turn.ending) == "all":
                stop = turn.segments[-1][1].place(pieces)
                spans.append((stop, stop + len(turn.ending)))
        return text, tuple(sorted(spans))

    def _trained_span(
        self, i: int, turn: TurnPlan, pieces: tuple[Span, ...], *, is_last: bool
    ) -> tuple[str, list[Span]]:
        """Return what is added to the text for a turn, and its trained spans. Raises DataError as `_trained_spans`."""
        if turn.problem:
            raise DataError(turn.problem)
        is_required = self.endings.is_required(turn.ending, is_trained=True, is_last=is_last)
        if is_required and turn.no_ending:
            raise DataError(turn.no_ending)
        bodies = [(start.place(pieces), stop.place(pieces)) for start, stop in turn.segments]
        if is_required and turn.ending:
            bodies[-1] = bodies[-1][0], bodies[-1][1] + len(turn.ending)
        bodies = [(start, stop) for start, stop in bodies if start < stop]
        if not bodies:
            raise DataError(f"message {i} is to be trained on, but it is empty and its end is not trained on")
        return turn.ending if is_required and turn.added else "", bodies

    def _left_out_thoughts(self, program: _Program, conversation: Conversation, outline: Outline) -> int:
        """Return how many thoughts the template leaves out.

        Raises DataError if they are those of the trained answers to the last question, and none of these is written,
        or if it leaves out a tool call.
        """
        if outline.left_out_calls:
            raise DataError(outline.left_out_calls)
        if not outline.left_out:
            return 0
        messages = conversation.messages
        question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        in_hand = [i for i in outline.left_out if i > question and conversation.trained[i]]
        written = {piece.turn for piece in outline.written.pieces if piece.kind == "t" and piece.turn > question}
        if in_hand and not written:
            raise DataError(_left_out_message(in_hand[-1], program.find_switch(conversation, in_hand[-1])))
        return len(outline.left_out)


def _locate(program: _Program, conversation: Conversation, text: str) -> tuple[Outline, tuple[Span, ...]]:
    """Return the outline of a rendered conversation, and where the pieces of the outline stand in its text.

    Raises DataError if the template leaves a message out or changes it.
    """
    try:
        outline, texts = program.outline(conversation)
        return outline, locate_texts(text, outline.written, texts)
    except DataError:
        if all((message["content"] or "").strip() for message in conversation.messages):
            raise
    # a template may write less around an empty text than around another
    outline, texts = program.outline(conversation, keeps_blank=True)
    return outline, locate_texts(text, outline.written, texts)


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
    has_thought = any((message.get(THOUGHT_KEY) or "").strip() for message in conversation.messages)
    if has_thought and not template.thought_names:
        raise DataError(
            f"the chat template does not write the thoughts of messages (it reads none of {', '.join(THOUGHT_NAMES)}), "
            + advice
        )


def _left_out_message(turn: int, switch: str) -> str:
    """Return the error for a template that does not write the thought of the answer in hand.

    `switch`: a variable of the template that has it written, with its value; "" if there is none.
    """
    advice = f"Switch it on (`chat_template_kwargs: {{{switch}}}`), take" if switch else "Take"
    return (
        f"the chat template leaves out the thought of message {turn}, an answer to the last question: the model would "
        f"learn to answer without it. {advice} a template that writes it (`chat_template_jinja: FILE`), or take the "
        "thoughts out of the rows, if answers without them are meant"
    )


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
