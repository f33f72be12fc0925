"""Tell the text that a chat template writes itself from the texts of the messages.

A conversation is rendered as it is, and again with stand-ins for its texts. What lies between the stand-ins is what the
template itself writes (its literals), which fixes where each text begins and ends in the first rendering, whatever the
text says ("[[1, 2]]", a role's name, a copy of another turn).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from finetuner.data.formats.base import Span
from finetuner.data.messages import Messages
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.errors import DataError

CONTENT, THOUGHT = "c", "t"  # kinds of a Piece
THOUGHT_KEY = "reasoning_content"  # of a message, as data/messages.py gives it
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
MARK_ANSWERS = "Mark the answers in the template with {% generation %} ... {% endgeneration %}"


class Piece(NamedTuple):
    """A text of message number `turn`, which is its content or its thought."""

    turn: int
    kind: str


@dataclass(frozen=True)
class StandIns:
    """Messages with stand-ins for their texts: `prefix`, the number of the message and the kind of text.

    `texts`: the row's text for each stand-in.
    """

    messages: Messages
    texts: Mapping[Piece, str]
    prefix: str


class Written(NamedTuple):
    """Pieces in the order in which a template wrote their stand-ins, and the len(pieces) + 1 literals around them."""

    pieces: tuple[Piece, ...]
    literals: tuple[str, ...]


def choose_prefix(messages: Messages) -> str:
    """Return a beginning for stand-ins that occurs in none of the messages' texts."""
    keys = ("content", THOUGHT_KEY)
    joined = "\0".join([str(message[key]) for key in keys for message in messages if key in message])
    salt = 0
    while f"q{salt}x" in joined:
        salt += 1
    return f"q{salt}x"


def stand_in(prefix: str, turn: int, kind: str = CONTENT) -> str:
    """Return the text that stands for a text of message number `turn`."""
    return f"{prefix}{turn}{kind}"


def put_stand_ins(template: ChatTemplate, messages: Messages, prefix: str, *, keeps_blank: bool = False) -> StandIns:
    """Return the messages with stand-ins for their contents and thoughts; tool calls stay as they are.

    A thought within the content of an answer ("<think>...</think>answer") is one of its own where the template looks
    for such. An empty text has one only where the message has nothing else; `keeps_blank`: not there either, if it is
    an answer.
    """
    out: Messages = []
    texts: dict[Piece, str] = {}
    for turn, message in enumerate(messages):
        changed = dict(message)
        thought, content = message.get(THOUGHT_KEY), message["content"] or ""
        if isinstance(thought, str) and thought.strip():
            texts[Piece(turn, THOUGHT)] = thought
            changed[THOUGHT_KEY] = stand_in(prefix, turn, THOUGHT)
        is_answer = message["role"] == "assistant"
        is_alone = THOUGHT_KEY not in message and "tool_calls" not in message
        if is_thought_within(template, message):
            changed["content"], within = _split_thought(content, prefix, turn)
            texts |= within
        elif content.strip() or (not keeps_blank and content) or (is_alone and not (keeps_blank and is_answer)):
            texts[Piece(turn, CONTENT)] = content
            changed["content"] = stand_in(prefix, turn)
        out.append(changed)
    return StandIns(out, texts, prefix)


def is_thought_within(template: ChatTemplate, message: Mapping[str, Any]) -> bool:
    """Return whether the content of an answer begins with a thought that the template looks for."""
    content = message["content"]
    if not template.looks_for_thoughts_in_text or message["role"] != "assistant" or not content:
        return False
    if THOUGHT_KEY in message or content.count(THOUGHT_ENDS) != 1:  # a thought beside the text comes first
        return False
    before = content.split(THOUGHT_ENDS)[0]
    return THOUGHT_BEGINS not in before or (before.count(THOUGHT_BEGINS) == 1 and not before.split("<")[0].strip())


def _split_thought(content: str, prefix: str, turn: int) -> tuple[str, dict[Piece, str]]:
    """Return a content with stand-ins for its thought and its answer, the tags and white space around them left."""
    before, after = content.split(THOUGHT_ENDS)
    opened, tag, thought = before.rpartition(THOUGHT_BEGINS)
    texts = {}
    for kind, text in ((THOUGHT, thought), (CONTENT, after)):
        if text.strip():
            texts[Piece(turn, kind)] = text.strip()
    thought, after = (
        text.replace(text.strip(), stand_in(prefix, turn, kind)) if text.strip() else text
        for kind, text in ((THOUGHT, thought), (CONTENT, after))
    )
    return opened + tag + thought + THOUGHT_ENDS + after, texts


def write_stand_ins(
    template: ChatTemplate, messages: Messages, tools: list[Any] | None, prefix: str, *, prompt: bool = False
) -> Written:
    """Return the stand-ins that a template writes, and what it writes around them. Raises DataError if it refuses."""
    split = re.split(f"{prefix}([0-9]+)([ct])", template.render(messages, tools, prompt=prompt))
    pieces = [Piece(int(turn), kind) for turn, kind in zip(split[1::3], split[2::3], strict=True)]
    return Written(tuple(pieces), tuple(split[::3]))


def locate_texts(text: str, written: Written, texts: Sequence[str]) -> tuple[Span, ...]:
    """Return the span of each piece in the rendered text, between the literals. `texts`: the row's, of each piece.

    Raises DataError if the template changed a piece by more than trimming or JSON quoting.
    """
    pieces, literals = written
    expected = [""] * (2 * len(pieces) + 1)
    expected[::2], expected[1::2] = literals, texts
    if "".join(expected) == text:  # nearly all conversations: written as they are
        ends = list(accumulate(map(len, expected)))
        return tuple(zip(ends[::2], ends[1::2], strict=False))
    spans = []
    at = 0
    for i, piece in enumerate(pieces):
        start = at + len(literals[i])
        stop = _piece_end(text, start, texts[i], literals[i + 1])
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
        f"the chat template changes the text of message {turn} (more than trimming it), or writes something else "
        f"around it than around another text, so it cannot be told which tokens are its own. {MARK_ANSWERS}"
    )
