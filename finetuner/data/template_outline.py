"""The shape of a rendered conversation: which of the template's own text belongs to which turn."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetuner.data.formats.base import Span
from finetuner.data.messages import Messages
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.data.template_spans import (
    CONTENT,
    THOUGHT,
    THOUGHT_KEY,
    Piece,
    StandIns,
    Written,
    choose_prefix,
    put_stand_ins,
    stand_in,
)
from finetuner.errors import DataError

USUAL_ROLES = ("system", "user", "assistant", "tool")


class Border(NamedTuple):
    """A place in a rendered text: `offset` characters into the literal before piece number `literal`."""

    literal: int
    offset: int

    def place(self, spans: Sequence[Span]) -> int:
        """Return the character of the text, of whose pieces these are the spans."""
        return (spans[self.literal - 1][1] if self.literal else 0) + self.offset


@dataclass(frozen=True)
class TurnPlan:
    """Segments of a turn in the written text, and the text that ends it, which follows the last of them.

    A turn has several segments if results of its tool calls stand within it. `added`: the ending is not in the
    template's text: the next turn would begin with it, and there is none. `problem`: why the turn cannot be trained on;
    "" if it can. `no_ending`: the error if its ending is to be trained on, but there is none; "" if none is needed.
    """

    segments: tuple[tuple[Border, Border], ...] = ()
    ending: str = ""
    added: bool = False
    problem: str = ""
    no_ending: str = ""


@dataclass(frozen=True)
class Outline:
    """Literals that a template writes around the texts of messages of one shape, and the plan of each turn.

    `left_out`: numbers of the messages whose thought it does not write. `left_out_calls`: the error if it leaves out a
    tool call; "" if not.
    """

    written: Written
    turns: tuple[TurnPlan, ...]
    left_out: tuple[int, ...]
    left_out_calls: str


@dataclass(frozen=True)
class Shape:
    """Messages with stand-ins for their texts, and what a template writes for them."""

    messages: Messages
    tools: list[Any] | None
    prefix: str
    written: Written


class Run(NamedTuple):
    """Neighboring pieces of an answer: the literal before them, and the last of them.

    last: None for a run without pieces, of tool calls or of nothing, which stands in that literal. after: number of the
    message whose text stands before the run. is_final: no other run of this answer follows.
    """

    literal: int
    last: int | None
    after: int
    is_final: bool


def find_runs(turn: int, message: dict[str, Any], pieces: Sequence[Piece]) -> list[Run]:
    """Return the runs of an answer. Raises DataError if its texts are written twice, or not in their place."""
    own = [k for k, piece in enumerate(pieces) if piece.turn == turn]
    if len({pieces[k].kind for k in own}) < len(own):
        raise DataError(
            f"the chat template writes a text of message {turn} twice, so it cannot be told which is learned"
        )
    begin = next((k for k, piece in enumerate(pieces) if piece.turn >= turn), len(pieces))
    begins = [begin] if not own or own[0] != begin else []
    if begins and own and "tool_calls" not in message:
        raise DataError(f"the chat template writes message {turn} behind a later one")
    begins += [k for k in own if k - 1 not in own]
    runs = []
    for k in begins:
        last = k if k in own else None
        while last is not None and last + 1 in own:
            last += 1
        runs.append(Run(k, last, pieces[k - 1].turn if k else -1, is_final=k == begins[-1]))
    if any(run.after < turn for run in runs[1:]):
        raise DataError(f"the chat template writes an earlier message within message {turn}")
    return runs


def require_all_written(stand_ins: StandIns, written: Written) -> tuple[int, ...]:
    """Return the numbers of the messages whose thought a template leaves out.

    Raises DataError if it leaves out a content.
    """
    pieces = set(written.pieces)
    missing = [piece for piece in stand_ins.texts if piece not in pieces]
    for turn, kind in missing:
        if kind == CONTENT:
            raise DataError(_left_out_text(turn, stand_ins.messages[turn]))
    return tuple(turn for turn, kind in missing if kind == THOUGHT)


def require_none_left_out(template: ChatTemplate, messages: Messages, tools: list[Any] | None) -> None:
    """Raise DataError if a template leaves out the text of a message; it may write it in capitals."""
    stand_ins = put_stand_ins(template, messages, choose_prefix(messages))
    try:
        text = template.render(stand_ins.messages, tools).lower()
    except DataError:  # it looks into texts: nothing can be said of them
        return
    for turn, kind in stand_ins.texts:
        if kind == CONTENT and stand_in(stand_ins.prefix, turn) not in text:
            raise DataError(_left_out_text(turn, messages[turn]))


def _left_out_text(turn: int, message: dict[str, Any]) -> str:
    role = message["role"]
    if role not in USUAL_ROLES:
        return _left_out_role(turn, role)
    beside = " beside its tool calls" if message.get("tool_calls") else ""
    without = ", or train without it: `drop_system_message: true`" if turn == 0 and role == "system" else ""
    return (
        f"the chat template does not write the text of message {turn} ({role}){beside}: it leaves it out, or changes "
        f"it. Take a template that writes it as it is (`chat_template`, `chat_template_jinja`){without}"
    )


def _left_out_role(turn: int, role: str) -> str:
    return (
        f"the chat template leaves out message {turn}, whose role is '{role}'. If that is another name for a role that "
        f"it writes, say so (`roles: {{ROLE: [{role}]}}`, with system, user, assistant or tool for ROLE)"
    )


def describe_left_out_call(turn: int, message: dict[str, Any], text: str) -> str:
    """Return the error if a tool call of a message is not in `text`, what the template writes for it; or ""."""
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    for name in names:
        if text.count(name) < names.count(name):
            return (
                f"the chat template writes {text.count(name)} of {names.count(name)} tool calls '{name}' of message "
                f"{turn}. Take a template that writes them all, or give each call a message of its own"
            )
    return ""


def text_between(written: Written, start: Border, stop: Border) -> str:
    """Return what a template itself writes between two places, without the texts of messages."""
    if start.literal == stop.literal:
        return written.literals[start.literal][start.offset : stop.offset]
    inner = written.literals[start.literal + 1 : stop.literal]
    first, last = written.literals[start.literal][start.offset :], written.literals[stop.literal][: stop.offset]
    return "".join([first, *inner, last])


def local_messages(messages: Messages) -> Messages:
    """Return the messages since the last question, with the question, behind the system text if there is one."""
    begin = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    head = messages[:1] if begin > 0 and messages[0]["role"] in ("system", "developer") else []
    return [*head, *messages[begin:]]


def place_of(messages: Messages, tools: list[Any] | None) -> Hashable:
    """Return what a place behind these messages has in common with others of its kind, whatever the texts say."""
    local = local_messages(messages)
    return (
        bool(tools),
        sum(message["role"] == "user" for message in messages) > 1,
        tuple(
            (
                message["role"],
                bool(message.get(THOUGHT_KEY)),
                len(message.get("tool_calls") or ()),
                bool(message["content"]),
            )
            for message in local
        ),
    )


def without_content(messages: Messages, turn: int) -> Messages:
    """Return the messages, of which one has no content."""
    return [{**message, "content": ""} if i == turn else message for i, message in enumerate(messages)]
