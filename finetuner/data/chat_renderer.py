"""Conversation -> text by a chat template, and which of its characters are trained on.

A plain conversation is rendered once, and compared with what the template writes around stand-ins for its contents,
which conversations with the same roles share. One with thoughts or tool calls is rendered on stand-ins of its own too.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from finetuner.data.formats import Rendered, Span
from finetuner.data.messages import Conversation, Messages
from finetuner.data.template_sandbox import ChatTemplate, compile_template
from finetuner.data.template_spans import (
    USUAL_ROLES,
    Outline,
    Piece,
    find_pieces,
    literals_between,
    mocked_plainly,
    outline,
    rewritten,
    said_in_calls,
    stand_in_for,
    with_thoughts_apart,
)
from finetuner.errors import DataError
from finetuner.recipe.sections.datasets import Ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_REMEMBERED = 2048


@dataclass(frozen=True)
class EndsOfTurns:
    """Which tokens end a turn, and which of these ends are trained on: `of_text` rules where the token is the
    tokenizer's end-of-text, `of_turn` where it is another."""

    tokens: tuple[str, ...]
    eos: str | None
    of_text: Ends = "turn"
    of_turn: Ends = "turn"

    def after(self, text: str, closing: str) -> str:
        """The tokens with which `text` begins, with white space before them; "" if there are none.

        More than one only as far as `closing`, which follows the last answer of all, has them too: what else follows
        at once begins the next turn ("</s>[INST]").
        """
        blank = len(text) - len(text.lstrip())
        ending = text[:blank] + self._at(text, blank)
        while (more := self._at(text, len(ending))) and closing.startswith(ending + more):
            ending += more
        return ending if ending.strip() else ""

    def _at(self, text: str, place: int) -> str:
        return max((token for token in self.tokens if text.startswith(token, place)), key=len, default="")

    def policy(self, ending: str) -> Ends:
        return self.of_text if self.eos is not None and ending.endswith(self.eos) else self.of_turn


@dataclass(frozen=True)
class _Turn:
    """Where what a turn says stands in the text, and what the template writes behind it."""

    body: Span
    following: str


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer's chat template, and what is learned of its text."""

    tokenizer: "PreTrainedTokenizerBase"
    ends: EndsOfTurns
    kwargs: Mapping[str, Any]
    only_answers: bool  # by role, with the ends of turns, as {% generation %} markers have it
    _outlines: dict[Hashable, Outline] = field(default_factory=dict)
    _templates: dict[str, ChatTemplate] = field(default_factory=dict)

    def render(self, conversation: Conversation) -> Rendered:
        """Raises DataError if the template refuses the conversation, or it cannot be told which text is whose."""
        template = self._template(conversation.tools)
        _require_understood(conversation, template.text)
        by_role = all(
            wish == (message["role"] == "assistant")
            for wish, message in zip(conversation.trained, conversation.messages, strict=True)
        )
        if template.marks_answers and self.only_answers and by_role:
            return self._with_tools(self._marked(template, conversation), conversation.tools)
        text = template.render(conversation.messages, conversation.tools)
        return self._with_tools(self._unmarked(template, conversation, text), conversation.tools)

    def _unmarked(self, template: ChatTemplate, conversation: Conversation, text: str) -> Rendered:
        messages = with_thoughts_apart(template, conversation.messages)
        if conversation.plain and messages is conversation.messages:
            return self._by_contents(template, conversation, text)
        return self._by_pieces(template, conversation, messages, text)

    def _with_tools(self, rendered: Rendered, tools: list[Any] | None) -> Rendered:
        """The same: what a row says of its tools is its own text too. A word of it that is a token and nothing more
        could not be told from the template's."""
        tokens, text = self.ends.tokens, rendered.text
        found = said_in_calls(tools, text, (0, len(text)), tokens)
        said = {(start, stop) for start, stop in found if text[start:stop] not in tokens}
        return replace(rendered, contents=tuple(sorted({*rendered.contents, *said}))) if said else rendered

    def _template(self, tools: list[Any] | None) -> ChatTemplate:
        """The tokenizer's, or the one of its several that is for tools."""
        text = str(self.tokenizer.get_chat_template(tools=tools))
        if text not in self._templates:
            self._templates[text] = compile_template(text, {**self.tokenizer.special_tokens_map, **self.kwargs})
        return self._templates[text]

    def _outline(self, template: ChatTemplate, messages: Messages, tools: list[Any] | None, stand_in: str) -> Outline:
        if tools is None and all(len(message) == 2 for message in messages):  # a role and a text, as nearly all are
            key: Hashable = (stand_in, *[message["role"] for message in messages])
        else:
            key = json.dumps([mocked_plainly(messages, stand_in), tools], default=repr)
        if "strftime_now" in template.text:
            key = (key, date.today())
        if key not in self._outlines:
            if len(self._outlines) >= MAX_REMEMBERED:
                self._outlines.clear()
            self._outlines[key] = outline(template, mocked_plainly(messages, stand_in), tools, stand_in)
        return self._outlines[key]

    def _marked(self, template: ChatTemplate, conversation: Conversation) -> Rendered:
        messages = conversation.messages
        if any(message["role"] not in USUAL_ROLES for message in messages):  # which it may leave out
            self._outline(template, messages, conversation.tools, stand_in_for(messages))
        text, spans = template.render_marked(messages, conversation.tools)
        spans = [(start, stop) for start, stop in spans if start < stop]
        if any(conversation.trained) and not spans:
            raise DataError("the chat template marks no answer of this conversation with {% generation %}")
        return Rendered(text, tuple(spans), wraps=False, contents=self._known(template, conversation, text))

    def _known(self, template: ChatTemplate, conversation: Conversation, text: str) -> tuple[Span, ...]:
        """Where the contents stand in the text of a template that marks the answers itself, if that can be told."""
        messages = with_thoughts_apart(template, conversation.messages)
        stand_in = stand_in_for(messages)
        try:
            if conversation.plain and messages is conversation.messages:
                pieces = [Piece(i, "c", message["content"]) for i, message in enumerate(messages)]
                literals = self._outline(template, messages, conversation.tools, stand_in).literals
            else:
                pieces, literals = literals_between(template, conversation, messages, stand_in)
            return find_pieces(text, pieces, literals)
        except DataError:
            return ()

    def _by_contents(self, template: ChatTemplate, conversation: Conversation, text: str) -> Rendered:
        """Of messages that are a role and a text: the text is learned, with the lead before and the end behind it."""
        messages, stand_in = conversation.messages, stand_in_for(conversation.messages)
        around = self._outline(template, messages, conversation.tools, stand_in)
        pieces = [Piece(i, "c", message["content"]) for i, message in enumerate(messages)]
        contents = find_pieces(text, pieces, around.literals)
        turns = [
            _Turn((start - len(literal) + around.given(i), stop), after)
            for i, ((start, stop), literal, after) in enumerate(
                zip(contents, around.literals[:-1], around.literals[1:], strict=True)
            )
        ]
        return Rendered(text, self._trained_spans(conversation.trained, turns), wraps=False, contents=contents)

    def _by_pieces(self, template: ChatTemplate, conversation: Conversation, messages: Messages, text: str) -> Rendered:
        """Where messages hold thoughts and tool calls too: an answer is what stands between the prompt for it and
        what the template writes behind a plain answer in its place."""
        stand_in = stand_in_for(messages)
        around = self._outline(template, messages, conversation.tools, stand_in)
        pieces, literals = literals_between(template, conversation, messages, stand_in)
        spans = find_pieces(text, pieces, literals)
        turns = []
        for i, message in enumerate(messages):
            own = [at for at, piece in enumerate(pieces) if piece.turn == i]
            first = own[0] if own else sum(piece.turn < i for piece in pieces)
            last = own[-1] + 1 if own else first
            opened = spans[first - 1][1] if first else 0
            before, behind, after = literals[first], literals[last], around.literals[i + 1]
            thinks = any(pieces[at].kind == "t" for at in own)
            given = around.before_thought(i, before) if thinks else around.given(i)
            if message["role"] != "assistant":
                start = spans[own[0]][0]
            elif before.startswith(around.literals[i][:given]):
                start = opened + given
            elif own and not thinks and before.endswith(around.literals[i]):  # behind another's tool calls
                start = spans[own[0]][0] - len(around.literals[i]) + given
            else:
                raise DataError(rewritten(i))
            stop = spans[last - 1][1] if last else 0
            if "tool_calls" in message:
                if not behind.endswith(after):
                    raise DataError(rewritten(i))
                stop += len(behind) - len(after)
            turns.append(_Turn((start, stop), after))
        said = {
            place
            for message, turn in zip(messages, turns, strict=True)
            for place in said_in_calls(message.get("tool_calls"), text, turn.body, self.ends.tokens)
        }
        contents = tuple(sorted({*spans, *said}))
        return Rendered(text, self._trained_spans(conversation.trained, turns), wraps=False, contents=contents)

    def _trained_spans(self, trained: tuple[bool, ...], turns: list[_Turn]) -> tuple[Span, ...]:
        """What is learned of each turn, and of its end."""
        closing = turns[-1].following
        last = max((i for i, wish in enumerate(trained) if wish), default=-1)
        spans = []
        endings = {following: self.ends.after(following, closing) for following in {turn.following for turn in turns}}
        for i, turn in enumerate(turns):
            (start, stop), ending = turn.body, endings[turn.following]
            policy = self.ends.policy(ending)
            if trained[i] and not ending.strip() and (policy in ("turn", "all") or (policy == "last" and i == last)):
                raise DataError(_endless(i, turn.following))
            with_end = ending.strip() and (
                policy == "all" or (trained[i] and (policy == "turn" or (policy == "last" and i == last)))
            )
            begin = start if trained[i] else stop
            end = stop + len(ending) if with_end else stop
            if trained[i] and begin == end:
                raise DataError(f"message {i} is to be learned, but it is empty and its end is not learned")
            if begin < end:
                spans.append((begin, end))
        return tuple(spans)


def _require_understood(conversation: Conversation, template: str) -> None:
    """A template that does not know of tools or thoughts leaves them out without a word."""
    has = set().union(*conversation.messages, ["tools"] if conversation.tools else [])
    for key in ("tools", "tool_calls", "reasoning_content"):
        if key in has and key not in template:
            raise DataError(
                f"the chat template does not write {key}, so the row's would be left out. Take a tokenizer whose "
                "template does, or name one with chat_template_jinja"
            )


def _endless(turn: int, following: str) -> str:
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
    """Raises DataError if the tokenizer has no chat template, or an eot token is not one token of its."""
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
    known = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    ends = EndsOfTurns(
        tokens=known if eot_tokens is None else tuple({*eot_tokens, *([eos] if eos else [])}),
        eos=eos,
        of_text=train_on_eos,
        of_turn=train_on_eot or train_on_eos,
    )
    return ChatRenderer(
        tokenizer, ends, dict(kwargs), only_answers=train_on_eos == ends.of_turn == "turn" and eot_tokens is None
    )
