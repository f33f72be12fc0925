"""Tell the text that a chat template writes itself from the texts of the messages.

A conversation is rendered as it is, and again with stand-ins for its texts. What lies between the stand-ins is what the
template itself writes (its literals), which fixes where each text begins and ends in the first rendering, whatever the
text says ("[[1, 2]]", a role's name, a copy of another turn). Each kind of rendering is done once, so the work is
linear in the length.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from finetuner.data.formats.base import Span
from finetuner.data.messages import Conversation, Messages
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.errors import DataError

USUAL_ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {"c": "content", "t": "reasoning_content"}  # kind of a MessageText -> key of its message
THOUGHT_ENDS = "</think>"
_MARK_ANSWERS = "Mark the answers in the template with {% generation %} ... {% endgeneration %}"
_NOT_IN_ORDER = (
    "the chat template does not write every message once and in order, so it cannot be told what each "
    f"turn became. {_MARK_ANSWERS}"
)


class MessageText(NamedTuple):
    """A text of message number `turn`: of kind c (content) or t (thought)."""

    turn: int
    kind: str
    text: str


@dataclass(frozen=True)
class Outline:
    """The text that a template writes around messages of certain roles, each with a content and nothing more.

    literals[i] stands before the content of message i, and the last one after all. `prompt` asks for an answer. `lead`
    is white space before an answer that the prompt does not give, so that a model writes it ("[/INST] answer" answers
    "[/INST]").
    """

    literals: list[str]
    prompt: str
    lead: str

    def num_given_before_thought(self, turn: int, literal: str) -> int:
        """Characters of `literal`, the template's text before the thought of this turn, that a model is given.

        They are as much of the prompt as stands there, which may begin the thought or, for an answer without one, end
        it too.
        """
        plain = self.literals[turn]
        for size in range(len(self.prompt), 0, -1):
            beginning = self.prompt[:size]
            at = plain.find(beginning)
            if at >= 0 and not beginning.isspace():
                shared = _num_shared(plain[: at + size], literal)
                return shared if shared > at else at + size
        return self.num_given(turn)

    def num_given(self, turn: int) -> int:
        """Characters of literals[turn] that a model is given before its answer: all but the lead."""
        literal = self.literals[turn]
        return len(literal) - (len(self.lead) if literal.endswith(self.lead) else 0)


def _num_shared(one: str, other: str) -> int:
    """Length of the longest common beginning, in characters."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def build_outline(template: ChatTemplate, stand_ins: Messages, tools: list[Any] | None, stand_in: str) -> Outline:
    """Return the outline of messages whose contents are `stand_in` with their numbers (see `replace_contents`).

    Raises DataError if the template does not write each content once and in order.
    """
    pieces = re.split(f"{stand_in}([0-9]+)c", template.render(stand_ins, tools))
    literals, written = pieces[::2], pieces[1::2]
    if written != [str(i) for i in range(len(stand_ins))]:
        for i, message in enumerate(stand_ins):
            if str(i) not in written and message["role"] not in USUAL_ROLES:
                raise DataError(
                    f"the chat template leaves out message {i}, whose role is '{message['role']}'. If that is another "
                    f"name for a role that it writes, say so: `roles: {{assistant: [{message['role']}]}}`"
                )
        raise DataError(_NOT_IN_ORDER)
    prompt, lead = _prompt_and_lead(template, stand_ins, tools, literals)
    return Outline(literals, prompt, lead)


def _prompt_and_lead(
    template: ChatTemplate, stand_ins: Messages, tools: list[Any] | None, literals: list[str]
) -> tuple[str, str]:
    """Return `prompt` and `lead` of an Outline, from the messages before the first answer."""
    first_answer = next((i for i, message in enumerate(stand_ins) if message["role"] == "assistant"), 0)
    if first_answer == 0:
        return "", ""
    before = stand_ins[:first_answer]
    try:
        asked = template.render(before, tools, prompt=True)
        unasked = template.render(before, tools)
    except DataError:  # a template that asks for an answer to users only
        return "", ""
    contents = [message["content"] for message in before]
    written = "".join(text for pair in zip(literals, contents, strict=False) for text in pair) + literals[first_answer]
    lead = written.removeprefix(asked)
    return (
        asked.removeprefix(unasked) if asked.startswith(unasked) else "",
        lead if written.startswith(asked) and lead.isspace() else "",
    )


def choose_stand_in(messages: Messages) -> str:
    """Return a beginning for stand-ins that occurs in none of the messages' texts."""
    joined = "\0".join([str(message[key]) for key in MESSAGE_KEYS.values() for message in messages if key in message])
    salt = 0
    while f"q{salt}x" in joined:
        salt += 1
    return f"q{salt}x"


def replace_contents(messages: Messages, stand_in: str) -> Messages:
    """Return the messages with stand-ins for their contents, without thoughts and tool calls."""
    own = ("reasoning_content", "tool_calls")
    plain = [{key: value for key, value in message.items() if key not in own} for message in messages]
    return [{**message, "content": f"{stand_in}{i}c"} for i, message in enumerate(plain)]


def split_off_thoughts(template: ChatTemplate, messages: Messages) -> Messages:
    """Return the messages with thoughts in answers ("<think>...</think>answer") as `reasoning_content`.

    As a template that knows of thoughts splits them; for other templates and messages, the same list is returned.
    """
    knows_thoughts = "reasoning_content" in template.text and THOUGHT_ENDS in template.text
    if not knows_thoughts or not any(THOUGHT_ENDS in message["content"] for message in messages):
        return messages
    out = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and THOUGHT_ENDS in content and "reasoning_content" not in message:
            before, after = content.split(THOUGHT_ENDS)[0], content.split(THOUGHT_ENDS)[-1]
            thought = before.rstrip("\n").split("<think>")[-1].lstrip("\n")
            message = {**message, "reasoning_content": thought, "content": after.lstrip("\n")}
        out.append(message)
    return out


def find_literals(
    template: ChatTemplate, conversation: Conversation, messages: Messages, stand_in: str
) -> tuple[list[MessageText], list[str]]:
    """Return the texts of messages that the template writes, in its order, and the n + 1 literals around them.

    Tool calls are in the literals. Raises DataError if the template writes a text twice, texts of several messages out
    of order, or leaves a content out.
    """
    stand_ins: Messages = []
    texts: dict[tuple[int, str], MessageText] = {}
    for turn, message in enumerate(messages):
        of_message = _texts_of_message(message)
        texts |= {(turn, kind): MessageText(turn, kind, text) for kind, text in of_message.items()}
        stand_ins.append({**message, **{MESSAGE_KEYS[kind]: f"{stand_in}{turn}{kind}" for kind in of_message}})
    split = re.split(f"{stand_in}([0-9]+)([ct])", template.render(stand_ins, conversation.tools))
    written = [(int(turn), kind) for turn, kind in zip(split[1::3], split[2::3], strict=True)]
    turns = [turn for turn, _ in written]
    is_once = len(set(written)) == len(written)
    if not is_once or turns != sorted(turns) or _contents(written) != _contents(texts):
        raise DataError(_NOT_IN_ORDER)
    return [texts[one] for one in written], split[::3]


def _contents(texts: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the (turn, kind) of texts that are contents."""
    return [(turn, kind) for turn, kind in texts if kind == "c"]


def _texts_of_message(message: dict[str, Any]) -> dict[str, str]:
    """Return kind -> text; an empty text only if it is the content of a message with nothing else."""
    has_more = "tool_calls" in message or "reasoning_content" in message
    return {
        kind: message[key]
        for kind, key in MESSAGE_KEYS.items()
        if key in message and (message[key] or (kind == "c" and not has_more))
    }


def locate_texts(text: str, pieces: Sequence[MessageText], literals: Sequence[str]) -> tuple[Span, ...]:
    """Return the span of each piece in the rendered text, between the literals.

    Raises DataError if the template changed a piece by more than trimming or JSON quoting.
    """
    expected = [""] * (2 * len(pieces) + 1)
    expected[::2], expected[1::2] = literals, [piece.text for piece in pieces]
    if "".join(expected) == text:  # nearly all conversations: written as they are
        ends = list(accumulate(map(len, expected)))
        return tuple(zip(ends[::2], ends[1::2], strict=False))
    spans = []
    at = 0
    for i, piece in enumerate(pieces):
        start = at + len(literals[i])
        stop = _piece_end(text, start, piece.text, literals[i + 1])
        if not text.startswith(literals[i], at) or stop is None:
            raise DataError(rewritten_message(piece.turn))
        spans.append((start, stop))
        at = stop
    if text[at:] != literals[-1]:
        raise DataError(rewritten_message(pieces[-1].turn if pieces else 0))
    return tuple(spans)


def _piece_end(text: str, start: int, piece: str, following: str) -> int | None:
    """Return where a piece that begins at `start` ends, if it is written in one of its variants; else None."""
    for variant in _variants(piece):
        if text.startswith(variant, start) and text.startswith(following, start + len(variant)):
            return start + len(variant)
    return None


def _variants(piece: str) -> Iterator[str]:
    """Yield a text as templates write it: unchanged, trimmed, or as the inside of a JSON string."""
    yield piece
    yield from (piece.strip(), piece.lstrip(), piece.rstrip())
    yield from (piece.strip("\n"), piece.lstrip("\n"), piece.rstrip("\n"))
    yield from (json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])


def find_token_like_values(calls: Any, text: str, body: Span, tokens: Sequence[str]) -> Iterator[Span]:
    """Yield where values of tool calls that contain one of the tokens are written, within the span `body` of the text.

    `calls`: any JSON value of a row, such as its tool calls or tools.
    """
    if isinstance(calls, dict):
        for key, value in calls.items():
            yield from find_token_like_values([key, value], text, body, tokens)
    elif isinstance(calls, list):
        for value in calls:
            yield from find_token_like_values(value, text, body, tokens)
    elif isinstance(calls, str) and any(token in calls for token in tokens):
        for variant in {calls, json.dumps(calls, ensure_ascii=False)[1:-1], json.dumps(calls)[1:-1]}:
            yield from (found.span() for found in re.compile(re.escape(variant)).finditer(text, *body))


def rewritten_message(turn: int) -> str:
    """Return the error for a template that changes a message's text, so that its tokens cannot be told apart."""
    return (
        f"the chat template changes the text of message {turn} (more than trimming it), so it cannot be told which "
        f"tokens are its own. {_MARK_ANSWERS}"
    )
