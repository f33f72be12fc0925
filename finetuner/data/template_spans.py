"""What a chat template writes of its own, and where it puts what messages say.

A conversation is rendered as it is, and again on stand-ins for its texts. What lies between the stand-ins is what the
template itself writes, which fixes where each text begins and ends in the first rendering, whatever it says
("[[1, 2]]", a role's name, a copy of another turn). One rendering of each kind, so the work is linear in the length.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from finetuner.data.formats import Span
from finetuner.data.messages import Conversation, Messages
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.errors import DataError

KINDS = {"c": "content", "t": "reasoning_content"}
THOUGHT_ENDS = "</think>"


class Piece(NamedTuple):
    """A text of a message: kind c (content) or t (thought)."""

    turn: int
    kind: str
    text: str


USUAL_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Outline:
    """What the template writes around messages of these roles, each a text and nothing more: literals[i] stands before
    the text of message i. `prompt` asks for an answer; `lead` is white space before an answer that a model is not given
    but writes itself ("[/INST] answer" answers "[/INST]")."""

    literals: list[str]
    prompt: str
    lead: str

    def before_thought(self, turn: int, literal: str) -> int:
        """Characters of `literal`, which stands before the thought of this turn, that a model is given: up to as much
        of the prompt as is there, which may begin the thought, or, for an answer without one, end it too."""
        plain = self.literals[turn]
        for size in range(len(self.prompt), 0, -1):
            begun = self.prompt[:size]
            at = plain.find(begun)
            if at >= 0 and not begun.isspace():
                shared = _num_shared(plain[: at + size], literal)
                return shared if shared > at else at + size
        return self.given(turn)

    def given(self, turn: int) -> int:
        """Characters of literals[turn] that a model is given before it answers at once: all but the lead."""
        literal = self.literals[turn]
        return len(literal) - (len(self.lead) if literal.endswith(self.lead) else 0)


def _num_shared(one: str, other: str) -> int:
    """Characters with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def outline(template: ChatTemplate, mocked: Messages, tools: list[Any] | None, stand_in: str) -> Outline:
    """Of messages whose contents are `stand_in` with their numbers. Raises DataError if one is not written once and in
    order."""
    pieces = re.split(f"{stand_in}([0-9]+)c", template.render(mocked, tools))
    if pieces[1::2] != [str(i) for i in range(len(mocked))]:
        for i, message in enumerate(mocked):
            if str(i) not in pieces[1::2] and message["role"] not in USUAL_ROLES:
                raise DataError(
                    f"the chat template leaves out message {i}, whose role is '{message['role']}'. If that is another "
                    f"name for a role that it writes, say so: `roles: {{assistant: [{message['role']}]}}`"
                )
        raise DataError(
            "the chat template does not write every message once and in order, so it cannot be told what each "
            "turn became. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
        )
    literals = pieces[::2]
    first = next((i for i, message in enumerate(mocked) if message["role"] == "assistant"), 0)
    if first == 0:
        return Outline(literals, "", "")
    try:
        asked = template.render(mocked[:first], tools, prompt=True)
        unasked = template.render(mocked[:first], tools)
    except DataError:  # it asks for an answer to users only
        return Outline(literals, "", "")
    contents = [message["content"] for message in mocked[:first]]
    written = "".join(text for pair in zip(literals, contents, strict=False) for text in pair) + literals[first]
    lead = written.removeprefix(asked)
    return Outline(
        literals,
        asked.removeprefix(unasked) if asked.startswith(unasked) else "",
        lead if written.startswith(asked) and lead.isspace() else "",
    )


def stand_in_for(messages: Messages) -> str:
    """The beginning of stand-ins that occur in none of the texts they stand for."""
    joined = "\0".join([str(message[key]) for key in KINDS.values() for message in messages if key in message])
    salt = 0
    while f"q{salt}x" in joined:
        salt += 1
    return f"q{salt}x"


def mocked_plainly(messages: Messages, stand_in: str) -> Messages:
    """The same roles, each message a stand-in and nothing more, but what a tool's or a user's may carry."""
    own = ("reasoning_content", "tool_calls")
    kept = [{key: value for key, value in message.items() if key not in own} for message in messages]
    return [{**message, "content": f"{stand_in}{i}c"} for i, message in enumerate(kept)]


def with_thoughts_apart(template: ChatTemplate, messages: Messages) -> Messages:
    """Answers that hold their thought in their text ("<think>...</think>answer"), as a template that knows of
    thoughts takes them apart."""
    knows = "reasoning_content" in template.text and THOUGHT_ENDS in template.text
    if not knows or not any(THOUGHT_ENDS in message["content"] for message in messages):
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


def literals_between(
    template: ChatTemplate, conversation: Conversation, messages: Messages, stand_in: str
) -> tuple[list[Piece], list[str]]:
    """The texts of the messages that the template writes, in order, and what it writes before, between and after them:
    tool calls are among it. Raises DataError if it writes one twice, out of order, or leaves a content out."""
    mocked: Messages = []
    pieces: dict[tuple[int, str], Piece] = {}
    for i, message in enumerate(messages):
        calls = "tool_calls" in message or "reasoning_content" in message
        texts = {
            kind: message[key]
            for kind, key in KINDS.items()
            if key in message and (message[key] or (kind == "c" and not calls))
        }
        pieces |= {(i, kind): Piece(i, kind, text) for kind, text in texts.items()}
        mocked.append({**message, **{KINDS[kind]: f"{stand_in}{i}{kind}" for kind in texts}})
    split = re.split(f"{stand_in}([0-9]+)([ct])", template.render(mocked, conversation.tools))
    found = [(int(turn), kind) for turn, kind in zip(split[1::3], split[2::3], strict=True)]
    contents = [one for one in found if one[1] == "c"]
    turns = [turn for turn, _ in found]
    if len(set(found)) < len(found) or turns != sorted(turns) or contents != [p for p in pieces if p[1] == "c"]:
        raise DataError(
            "the chat template does not write every message once and in order, so it cannot be told what each "
            "turn became. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
        )
    return [pieces[one] for one in found], split[::3]


def find_pieces(text: str, pieces: Sequence[Piece], literals: Sequence[str]) -> tuple[Span, ...]:
    """Where each piece stands between the template's own texts; DataError if it changed them."""
    parts = [""] * (2 * len(pieces) + 1)
    parts[::2], parts[1::2] = literals, [piece.text for piece in pieces]
    if "".join(parts) == text:  # nearly all conversations: as they stand
        ends = list(accumulate(map(len, parts)))
        return tuple(zip(ends[::2], ends[1::2], strict=False))
    spans = []
    at = 0
    for i, piece in enumerate(pieces):
        start = at + len(literals[i])
        stop = _piece_end(text, start, piece.text, literals[i + 1])
        if not text.startswith(literals[i], at) or stop is None:
            raise DataError(rewritten(piece.turn))
        spans.append((start, stop))
        at = stop
    if text[at:] != literals[-1]:
        raise DataError(rewritten(pieces[-1].turn if pieces else 0))
    return tuple(spans)


def _piece_end(text: str, start: int, piece: str, following: str) -> int | None:
    """Where it ends: as it stands, or as a template that trims it or writes it as JSON has it."""
    for variant in _variants(piece):
        if text.startswith(variant, start) and text.startswith(following, start + len(variant)):
            return start + len(variant)
    return None


def _variants(piece: str) -> Iterator[str]:
    yield piece
    yield from (piece.strip(), piece.lstrip(), piece.rstrip())
    yield from (piece.strip("\n"), piece.lstrip("\n"), piece.rstrip("\n"))
    yield from (json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])


def said_in_calls(calls: Any, text: str, body: Span, tokens: Sequence[str]) -> Iterator[Span]:
    """Where a row's own words in its tool calls look like tokens, in the part of the text that holds them."""
    if isinstance(calls, dict):
        for key, value in calls.items():
            yield from said_in_calls([key, value], text, body, tokens)
    elif isinstance(calls, list):
        for value in calls:
            yield from said_in_calls(value, text, body, tokens)
    elif isinstance(calls, str) and any(token in calls for token in tokens):
        for form in {calls, json.dumps(calls, ensure_ascii=False)[1:-1], json.dumps(calls)[1:-1]}:
            yield from (found.span() for found in re.compile(re.escape(form)).finditer(text, *body))


def rewritten(turn: int) -> str:
    return (
        f"the chat template changes the text of message {turn} (more than trimming it), so it cannot be told which "
        "tokens are its own. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
    )
