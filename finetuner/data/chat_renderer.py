"""Render conversations with a chat template, and find which characters are trained on.

A plain conversation is rendered once, and compared with what the template writes around stand-ins for its contents,
which is cached for conversations with the same roles. One with thoughts or tool calls is also rendered with stand-ins
of its own.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from finetuner.data.formats.base import Rendered, Span
from finetuner.data.messages import Conversation, Messages
from finetuner.data.template_sandbox import ChatTemplate, compile_template
from finetuner.data.template_spans import (
    USUAL_ROLES,
    MessageText,
    Outline,
    build_outline,
    choose_stand_in,
    find_literals,
    find_token_like_values,
    locate_texts,
    replace_contents,
    rewritten_message,
    split_off_thoughts,
)
from finetuner.errors import DataError
from finetuner.recipe.sections.datasets import Ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CACHED_OUTLINES = 2048


@dataclass(frozen=True)
class TurnEndings:
    """The tokens that end a turn, and which turns have their ending trained on.

    `of_text` rules where that token is the tokenizer's end-of-text (`eos`), `of_turn` where it is another.
    """

    tokens: tuple[str, ...]
    eos: str | None
    of_text: Ends = "turn"
    of_turn: Ends = "turn"

    def after(self, text: str, closing: str) -> str:
        """Return the tokens with which `text` begins, with white space before them; "" if there are none.

        More than one only as far as `closing`, the text after the last answer of all, begins with them too: other
        tokens that follow begin the next turn ("</s>[INST]").
        """
        num_blanks = len(text) - len(text.lstrip())
        ending = text[:num_blanks] + self._token_at(text, num_blanks)
        while (more := self._token_at(text, len(ending))) and closing.startswith(ending + more):
            ending += more
        return ending if ending.strip() else ""

    def _token_at(self, text: str, start: int) -> str:
        return max((token for token in self.tokens if text.startswith(token, start)), key=len, default="")

    def policy(self, ending: str) -> Ends:
        """Return the rule for turns that end with this text."""
        return self.of_text if self.eos is not None and ending.endswith(self.eos) else self.of_turn

    def is_required(self, ending: str, *, is_trained: bool, is_last: bool) -> bool:
        """Return whether a turn must have its ending trained on; `is_last`: no later turn is trained on."""
        policy = self.policy(ending)
        return is_trained and (policy in ("turn", "all") or (policy == "last" and is_last))


@dataclass(frozen=True)
class _Turn:
    """The span of a turn's own text, and the text that the template writes after it."""

    body: Span
    following: str


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
    _outlines: dict[Hashable, Outline] = field(default_factory=dict)
    _templates: dict[str, ChatTemplate] = field(default_factory=dict)

    def render(self, conversation: Conversation) -> Rendered:
        """Return the text of a conversation and its trained spans.

        Raises DataError if the template refuses the conversation, or it cannot be told which text is the template's
        and which is a message's.
        """
        template = self._template(conversation.tools)
        _require_understood(conversation, template.text)
        is_by_role = all(
            is_trained == (message["role"] == "assistant")
            for is_trained, message in zip(conversation.trained, conversation.messages, strict=True)
        )
        if template.marks_answers and self.only_answers and is_by_role:
            rendered = self._render_marked(template, conversation)
        else:
            rendered = self._render_unmarked(template, conversation)
        return self._with_tool_contents(rendered, conversation.tools)

    def _render_unmarked(self, template: ChatTemplate, conversation: Conversation) -> Rendered:
        text = template.render(conversation.messages, conversation.tools)
        messages = split_off_thoughts(template, conversation.messages)
        if conversation.plain and messages is conversation.messages:
            return self._by_contents(template, conversation, text)
        return self._by_pieces(template, conversation, messages, text)

    def _with_tool_contents(self, rendered: Rendered, tools: list[Any] | None) -> Rendered:
        """Return the rendering with token-like values of the row's tools among its contents, which are words.

        A value that is a token and nothing more cannot be told from the template's own, and is left as it is.
        """
        tokens, text = self.endings.tokens, rendered.text
        found = find_token_like_values(tools, text, (0, len(text)), tokens)
        values = {(start, stop) for start, stop in found if text[start:stop] not in tokens}
        return replace(rendered, contents=tuple(sorted({*rendered.contents, *values}))) if values else rendered

    def _template(self, tools: list[Any] | None) -> ChatTemplate:
        """Return the tokenizer's template, or, if it has several, the one for tools."""
        text = str(self.tokenizer.get_chat_template(tools=tools))
        if text not in self._templates:
            self._templates[text] = compile_template(text, {**self.tokenizer.special_tokens_map, **self.kwargs})
        return self._templates[text]

    def _outline(self, template: ChatTemplate, messages: Messages, tools: list[Any] | None, stand_in: str) -> Outline:
        if tools is None and all(len(message) == 2 for message in messages):  # a role and a text, as nearly all are
            key: Hashable = (stand_in, *[message["role"] for message in messages])
        else:
            key = json.dumps([replace_contents(messages, stand_in), tools], default=repr)
        if "strftime_now" in template.text:
            key = (key, date.today())
        if key not in self._outlines:
            if len(self._outlines) >= MAX_CACHED_OUTLINES:
                self._outlines.clear()
            self._outlines[key] = build_outline(template, replace_contents(messages, stand_in), tools, stand_in)
        return self._outlines[key]

    def _render_marked(self, template: ChatTemplate, conversation: Conversation) -> Rendered:
        """Render with a template that marks the answers itself."""
        messages = conversation.messages
        if any(message["role"] not in USUAL_ROLES for message in messages):
            # raises if the template leaves a message of an unusual role out
            self._outline(template, messages, conversation.tools, choose_stand_in(messages))
        text, spans = template.render_marked(messages, conversation.tools)
        spans = [(start, stop) for start, stop in spans if start < stop]
        if any(conversation.trained) and not spans:
            raise DataError("the chat template marks no answer of this conversation with {% generation %}")
        contents = self._find_contents(template, conversation, text)
        return Rendered(text, tuple(spans), wraps=False, contents=contents)

    def _find_contents(self, template: ChatTemplate, conversation: Conversation, text: str) -> tuple[Span, ...]:
        """Return the spans of the messages' texts; none if the template rewrites them."""
        messages = split_off_thoughts(template, conversation.messages)
        stand_in = choose_stand_in(messages)
        try:
            if conversation.plain and messages is conversation.messages:
                pieces = [MessageText(i, "c", message["content"]) for i, message in enumerate(messages)]
                literals = self._outline(template, messages, conversation.tools, stand_in).literals
            else:
                pieces, literals = find_literals(template, conversation, messages, stand_in)
            return locate_texts(text, pieces, literals)
        except DataError:
            return ()

    def _by_contents(self, template: ChatTemplate, conversation: Conversation, text: str) -> Rendered:
        """Find the trained spans where each message is a role and a text: the text, with the lead before it and the
        ending after it."""
        messages, stand_in = conversation.messages, choose_stand_in(conversation.messages)
        outline = self._outline(template, messages, conversation.tools, stand_in)
        pieces = [MessageText(i, "c", message["content"]) for i, message in enumerate(messages)]
        contents = locate_texts(text, pieces, outline.literals)
        turns = [
            _Turn((start - len(literal) + outline.num_given(i), stop), after)
            for i, ((start, stop), literal, after) in enumerate(
                zip(contents, outline.literals[:-1], outline.literals[1:], strict=True)
            )
        ]
        return Rendered(text, self._trained_spans(conversation.trained, turns), wraps=False, contents=contents)

    def _by_pieces(self, template: ChatTemplate, conversation: Conversation, messages: Messages, text: str) -> Rendered:
        """Find the trained spans where messages hold thoughts or tool calls: an answer reaches from the prompt for it
        to the text that the template writes after a plain answer in its place."""
        stand_in = choose_stand_in(messages)
        outline = self._outline(template, messages, conversation.tools, stand_in)
        pieces, literals = find_literals(template, conversation, messages, stand_in)
        spans = locate_texts(text, pieces, literals)
        turns = [_find_turn(i, message, outline, pieces, literals, spans) for i, message in enumerate(messages)]
        call_values = {
            span
            for message, turn in zip(messages, turns, strict=True)
            for span in find_token_like_values(message.get("tool_calls"), text, turn.body, self.endings.tokens)
        }
        contents = tuple(sorted({*spans, *call_values}))
        return Rendered(text, self._trained_spans(conversation.trained, turns), wraps=False, contents=contents)

    def _trained_spans(self, trained: tuple[bool, ...], turns: list[_Turn]) -> tuple[Span, ...]:
        """Return the spans of the turns that are trained on, and of the endings that the rules train on.

        Raises DataError if a trained turn has no ending although its ending is to be trained on, or has nothing in it.
        """
        closing = turns[-1].following
        last = max((i for i, is_trained in enumerate(trained) if is_trained), default=-1)
        endings = {text: self.endings.after(text, closing) for text in {turn.following for turn in turns}}
        spans = []
        for i, turn in enumerate(turns):
            (start, stop), ending = turn.body, endings[turn.following]
            is_required = self.endings.is_required(ending, is_trained=trained[i], is_last=i == last)
            if is_required and not ending:
                raise DataError(_endless_message(i, turn.following))
            begin = start if trained[i] else stop
            end = stop + len(ending) if is_required or self.endings.policy(ending) == "all" else stop
            if trained[i] and begin == end:
                raise DataError(f"message {i} is to be trained on, but it is empty and its end is not trained on")
            if begin < end:
                spans.append((begin, end))
        return tuple(spans)


def _find_turn(
    turn: int,
    message: dict[str, Any],
    outline: Outline,
    pieces: list[MessageText],
    literals: list[str],
    spans: tuple[Span, ...],
) -> _Turn:
    """Return the body of a message in the rendered text, with its thought and tool calls, and the text after it.

    spans[k] is the span of pieces[k], between literals[k] and literals[k + 1]. Raises DataError if the template writes
    the turn otherwise than its outline.
    """
    own = [k for k, piece in enumerate(pieces) if piece.turn == turn]
    first = own[0] if own else sum(piece.turn < turn for piece in pieces)
    past_last = own[-1] + 1 if own else first
    if message["role"] == "assistant":
        previous_stop = spans[first - 1][1] if first else 0
        has_thought = any(pieces[k].kind == "t" for k in own)
        content_start = spans[own[0]][0] if own and not has_thought else None
        start = _answer_start(turn, outline, literals[first], previous_stop, content_start, has_thought=has_thought)
    else:
        start = spans[own[0]][0]
    stop = spans[past_last - 1][1] if past_last else 0
    behind, after = literals[past_last], outline.literals[turn + 1]
    if "tool_calls" in message:  # they are in the literal after the turn's last text
        if not behind.endswith(after):
            raise DataError(rewritten_message(turn))
        stop += len(behind) - len(after)
    return _Turn((start, stop), after)


def _answer_start(
    turn: int, outline: Outline, before: str, previous_stop: int, content_start: int | None, *, has_thought: bool
) -> int:
    """Return where the text begins that a model writes as this answer, after the prompt for it.

    `before`: the literal before the answer's first text, which begins at `previous_stop`. `content_start`: where that
    text begins, if it is the content.
    """
    num_given = outline.num_given_before_thought(turn, before) if has_thought else outline.num_given(turn)
    plain = outline.literals[turn]
    if before.startswith(plain[:num_given]):
        return previous_stop + num_given
    if content_start is not None and before.endswith(plain):  # the literal begins with another message's tool calls
        return content_start - len(plain) + num_given
    raise DataError(rewritten_message(turn))


def _require_understood(conversation: Conversation, template: str) -> None:
    """Raise DataError if a template does not know of the row's tools or thoughts: it would silently omit them."""
    has = set().union(*conversation.messages, ["tools"] if conversation.tools else [])
    for key in ("tools", "tool_calls", "reasoning_content"):
        if key in has and key not in template:
            raise DataError(
                f"the chat template does not write {key}, so the row's would be left out. Take a tokenizer whose "
                "template does, or name one with chat_template_jinja"
            )


def _endless_message(turn: int, following: str) -> str:
    """Return the error for a template that ends a trained turn with no token."""
    return (
        f"the chat template writes {following[:30]!r} after message {turn}, which does not begin with a token that "
        "ends a turn: a model trained on it would not learn where to stop. Use a template that ends turns with a "
        "special token, or name the one it ends them with (`eot_tokens: [...]`), and add it where the vocabulary lacks "
        "it (`tokens: [...]`)"
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
