"""What a template writes behind a conversation so far: what asks for an answer, and what ends one.

Rendered for stand-ins of the texts, once for each kind of place in a conversation, and remembered.
"""

from collections.abc import Hashable
from functools import cached_property
from typing import Any, TypeVar

from finetuner.data.messages import Messages
from finetuner.data.template_outline import Shape, local_messages, place_of
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.data.template_spans import CONTENT, Piece, stand_in, write_stand_ins
from finetuner.data.turn_endings import TurnEndings
from finetuner.errors import DataError

MAX_REMEMBERED = 4096  # places of conversations
_Value = TypeVar("_Value")


class ConversationTails:
    """Finds the text that one template writes behind conversations. `endings`: the tokens that end turns."""

    def __init__(self, template: ChatTemplate, endings: TurnEndings) -> None:
        self.template, self.endings = template, endings
        self._tails: dict[Hashable, str | None] = {}  # kind of place -> text behind the last message's; None: refused
        self._sizes: dict[Hashable, int] = {}  # kind of place and literal -> characters of it that are also there

    @cached_property
    def asking(self) -> str:
        """The text that asks for an answer to one question; "" if it cannot be told from the question's end."""
        question = [{"role": "user", "content": stand_in("q0x", 0)}]
        try:
            asked = self.tail(question, None, "q0x", behind=None)
            unasked = self.tail(question, None, "q0x", behind=0)
        except DataError:
            return ""
        return asked.removeprefix(unasked) if asked.startswith(unasked) else ""

    @cached_property
    def opening(self) -> str:
        """The token with which a conversation begins behind begin-of-text, and so every turn; "" if it is none."""
        try:
            written = write_stand_ins(self.template, [{"role": "user", "content": stand_in("q0x", 0)}], None, "q0x")
        except DataError:
            return ""
        begin = written.literals[0].removeprefix(str(self.template.variables.get("bos_token") or ""))
        return self.endings.added_at_beginning(begin)

    def shared_with(
        self, shape: Shape, messages: Messages, literal: str, *, behind: int | None
    ) -> tuple[int, str] | None:
        """Return how many characters of a literal stand also behind the conversation so far, and what stands there.

        `behind`, `None`: as in `tail`. Returns None if the template refuses the conversation so far.
        """
        is_called = bool(messages and messages[-1].get("tool_calls"))  # then the calls stand there as well
        place = (None if behind is None else len(messages) - behind, place_of(messages, shape.tools))
        fresh = is_called or place not in self._tails
        if fresh:
            remember(self._tails, place, self._tail_or_none(messages, shape, literal, behind=behind))
        tail = self._tails[place]
        if tail is None:
            return None
        if literal.startswith(tail):
            return len(tail), tail
        key = (place, literal[: len(tail) + 1])
        if fresh or key not in self._sizes:
            tail = tail if fresh else self._tail_or_none(messages, shape, literal, behind=behind)
            if tail is None:
                return None
            remember(self._sizes, key, self.endings.num_shared(tail, literal))
        return self._sizes[key], tail

    def _tail_or_none(self, messages: Messages, shape: Shape, literal: str, *, behind: int | None) -> str | None:
        is_called = bool(messages and messages[-1].get("tool_calls"))
        # Calls are the row's own, so such a place is rendered for each row: with as little before it as will do.
        for some in [local_messages(messages)] * is_called + [messages]:
            try:
                tail = self.tail(some, shape.tools, shape.prefix, behind=behind)
            except DataError:
                continue
            if some is messages or literal.startswith(tail):
                return tail
        return None

    def tail(self, messages: Messages, tools: list[Any] | None, prefix: str, *, behind: int | None) -> str:
        """Return what the template writes behind the texts of message number `behind`, or behind all texts.

        None: behind all, with the text that asks for an answer. A template that never asks for an answer is taken to
        ask with what it writes before one, but for white space.
        """
        pieces, literals = write_stand_ins(self.template, messages, tools, prefix, prompt=behind is None)
        own = [k for k, piece in enumerate(pieces) if piece.turn == behind]
        if own:
            return literals[own[-1] + 1]
        tail = literals[-1]
        if self.template.asks or behind is not None:
            return tail
        answer = {"role": "assistant", "content": stand_in(prefix, len(messages))}
        pieces, literals = write_stand_ins(self.template, [*messages, answer], tools, prefix)
        if Piece(len(messages), CONTENT) not in pieces:
            return tail
        before = literals[pieces.index(Piece(len(messages), CONTENT))]
        return tail if before.startswith(tail) and not before.removeprefix(tail).strip() else before

    def next_turn(self, shape: Shape, role: str) -> str | None:
        """Return what would stand between the last text and that of another turn; None if it is refused."""
        number = len(shape.messages)
        another = {"role": role, "content": stand_in(shape.prefix, number)}
        try:
            pieces, literals = write_stand_ins(self.template, [*shape.messages, another], shape.tools, shape.prefix)
        except DataError:
            return None
        places = [k for k, piece in enumerate(pieces) if piece.turn == number]
        # behind the last piece of this conversation, whatever stands before the other turn's text
        last = shape.written.pieces[-1] if shape.written.pieces else None
        if not places or (places[0] and pieces[places[0] - 1] != last):
            return literals[pieces.index(last) + 1] if last in pieces else None
        return literals[places[0]]


def remember(cache: dict[Hashable, _Value], key: Hashable, value: _Value) -> None:
    """Add to a cache, which begins anew when it is full."""
    if len(cache) >= MAX_REMEMBERED:
        cache.clear()
    cache[key] = value
