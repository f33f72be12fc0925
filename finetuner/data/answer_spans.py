"""Find what a model must write of a conversation: what stands behind the text with which the template asks for it.

An answer begins where the template's text of the conversation so far ends, rendered with add_generation_prompt, and
ends where the template's text of the conversation with the answer ends. Both are rendered for stand-ins of the texts,
once for each kind of place in a conversation (the roles, thoughts and calls since the last question, not the texts),
and what they say holds wherever the template's own text there is the same.
"""

from collections.abc import Hashable
from typing import Any

from finetuner.data.conversation_tails import ConversationTails, remember
from finetuner.data.messages import Messages
from finetuner.data.template_outline import (
    Border,
    Outline,
    Run,
    Shape,
    TurnPlan,
    describe_left_out_call,
    find_runs,
    local_messages,
    place_of,
    require_all_written,
    text_between,
    without_content,
)
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.data.template_spans import MARK_ANSWERS, StandIns, write_stand_ins
from finetuner.data.turn_endings import TurnEndings
from finetuner.errors import DataError


class AnswerFinder:
    """Finds the turns of conversations in what one template writes, and remembers what it found of each kind of place.

    `endings`: the tokens that end turns.
    """

    def __init__(self, template: ChatTemplate, endings: TurnEndings) -> None:
        self.template, self.endings = template, endings
        self.tails = ConversationTails(template, endings)
        self._closings: dict[Hashable, int] = {}  # kind of place and text behind the last answer -> its end's length

    def find(self, stand_ins: StandIns, tools: list[Any] | None) -> Outline:
        """Return the outline of messages. Raises DataError if the template refuses them, or leaves one of them out."""
        written = write_stand_ins(self.template, stand_ins.messages, tools, stand_ins.prefix)
        left_out = require_all_written(stand_ins, written)
        left_out_calls = ""
        shape = Shape(stand_ins.messages, tools, stand_ins.prefix, written)
        turns = []
        for turn, message in enumerate(shape.messages):
            try:
                plan = self._answer(shape, turn) if message["role"] == "assistant" else self._other(shape, turn)
            except DataError as error:
                plan = TurnPlan(problem=str(error))
            turns.append(plan)
            own = "".join(text_between(written, start, stop) for start, stop in plan.segments)
            if not plan.problem and not left_out_calls:
                left_out_calls = describe_left_out_call(turn, message, own)
        return Outline(written, tuple(turns), left_out, left_out_calls)

    def _other(self, shape: Shape, turn: int) -> TurnPlan:
        """Return the plan of a turn that is no answer: its text, and the token behind it."""
        own = [k for k, piece in enumerate(shape.written.pieces) if piece.turn == turn]
        if len(own) != 1:
            times = f"the text of message {turn} {len(own)} times" if own else f"nothing of message {turn}"
            raise DataError(f"the chat template writes {times}, so it cannot be told what to train on")
        following = shape.written.literals[own[0] + 1]
        ending = self.endings.first(following).ending
        segment = Border(own[0], len(shape.written.literals[own[0]])), Border(own[0] + 1, 0)
        return TurnPlan((segment,), ending, no_ending="" if ending else self._no_ending(shape, turn, following))

    def _answer(self, shape: Shape, turn: int) -> TurnPlan:
        pieces, literals = shape.written
        runs = find_runs(turn, shape.messages[turn], pieces)
        segments = []
        plan = TurnPlan()
        for number, run in enumerate(runs):
            before = shape.messages[:turn] if number == 0 else without_content(shape.messages[: run.after + 1], turn)
            start = Border(run.literal, self._given_size(shape, before, run, literals[run.literal]))
            plan = self._end(shape, turn, run, start.offset)
            segments.append((start, plan.segments[0][1]))
        return TurnPlan(tuple(segments), plan.ending, plan.added, no_ending=plan.no_ending)

    # --- where an answer begins ---

    def _given_size(self, shape: Shape, before: Messages, run: Run, literal: str) -> int:
        """Characters of the literal before an answer that the model is given: all that asks for the answer."""
        found = self.tails.shared_with(shape, before, literal, behind=None)
        if found is not None:
            size, tail = found
            if size == len(tail):
                return size
            if size > len(tail) - len(self.tails.asking):
                return size
        # The template refuses to ask here, or what asks stands behind other text than in the conversation so far.
        for length in range(len(self.tails.asking), 0, -1):
            asking = self.tails.asking[:length]
            at = literal.rfind(asking)
            if (
                at >= 0
                and asking.strip() not in ("", self.tails.opening)
                and not self.endings.cuts_token(self.tails.asking, length)
            ):
                return at + length
        if found is not None:
            return found[0]
        if run.last is None:
            raise DataError(f"{_UNTOLD.format(f'where message {run.after + 1} begins')}. {MARK_ANSWERS}")
        return len(literal)

    # --- where it ends ---

    def _end(self, shape: Shape, turn: int, run: Run, start: int) -> TurnPlan:
        """Return the plan of a run of an answer, of whose one segment the end alone is meant."""
        literals = shape.written.literals
        k = run.literal if run.last is None else run.last + 1
        literal, begin = literals[k], start if run.last is None else 0
        upto = shape.messages[: max(turn, run.after) + 1]
        if not run.is_final:
            upto = without_content(upto, turn)
        message = shape.messages[turn]
        is_last = k == len(literals) - 1 and turn == len(shape.messages) - 1
        if is_last:
            stop, is_whole = self._closing_size(shape, literal, begin), True
        elif run.last is None:
            stop, is_whole = self._called_size(shape, turn, upto, literal, begin)
        else:
            found = self.tails.shared_with(shape, upto, literal, behind=turn)
            stop, is_whole = (0, False) if found is None else (found[0], found[0] == len(found[1]))
            if not is_whole:
                stop = self._without_opening(literal, begin, stop)
        region = literal[begin:stop]
        has_calls = bool(message.get("tool_calls"))
        if not run.is_final:
            return _plan(k, begin + len(region.rstrip()))
        found_end = self.endings.leading(region) if run.last is not None and not has_calls else None
        if found_end is None or not found_end.ending:
            found_end = self.endings.last(region, one=has_calls)
        # behind a call's arguments, which may hold such a token as well
        if found_end.ending and (found_end.at == 0 or not region[found_end.at + len(found_end.ending) :].strip()):
            return _plan(k, begin + found_end.at, found_end.ending)
        if not is_whole and (other := self._other_end(literal[stop:])):
            return _plan(k, stop, other)
        if named := self.endings.named_at_beginning(literal[stop:]):
            return _plan(k, stop, named)
        if is_last and (named := self._named_by_next_turn(shape, turn)):
            return _plan(k, stop, named, added=True)
        if self._goes_on(shape, turn, k, region, stop):
            return _plan(k, begin + len(region.rstrip()))
        if is_last and (run.last is None or has_calls):  # the literal begins before the calls
            return _plan(k, stop, no_ending=self._no_ending(shape, turn, "", ends_with=region))
        following = literal[begin if is_last or stop == len(literal) else stop :]
        return _plan(k, stop, no_ending=self._no_ending(shape, turn, following))

    def _without_opening(self, literal: str, begin: int, stop: int) -> int:
        """Return `stop`, or where the token stands before it with which the next turn begins.

        What asks for an answer, where a template always does so, may begin with the same token as another turn.
        """
        if self.tails.opening and literal[begin:stop].rstrip().endswith(self.tails.opening):
            return literal.rindex(self.tails.opening, begin, stop)
        return stop

    def _other_end(self, following: str) -> str:
        """Return the token that ends an answer within a conversation, if another one ends the last answer; or "".

        A token with which the next turn begins is none.
        """
        token = self.endings.first(following).ending
        begins_next = token.strip() == self.tails.opening or not following[len(token) :].strip()
        return "" if begins_next else token

    def _goes_on(self, shape: Shape, turn: int, literal: int, region: str, stop: int) -> bool:
        """Return whether the model's turn goes on behind a message: with a tool's result, or with another answer."""
        pieces, literals = shape.written
        if literal == len(pieces):
            return False
        if shape.messages[pieces[literal].turn]["role"] == "assistant" and stop == len(literals[literal]):
            return True
        # A result stands within the model's turn where the template does not ask anew behind it.
        has_token = any(region.rstrip().endswith(token) for token in self.endings.added)
        called = turn + 1
        while called < len(shape.messages) and shape.messages[called]["role"] == "tool":
            called += 1
        if called == turn + 1 or not has_token:
            return False
        asked, unasked = (
            self.tails.shared_with(shape, shape.messages[:called], "", behind=at) for at in (None, called - 1)
        )
        return asked is not None and unasked is not None and asked[1] == unasked[1]

    def _closing_size(self, shape: Shape, literal: str, begin: int) -> int:
        """Characters of the text behind the last answer that end it, without text that asks for another one."""
        if not literal[begin:].strip():
            return len(literal)
        key = ("closing", place_of(shape.messages, shape.tools), literal[begin:])
        if key not in self._closings:
            size = len(literal)
            following = self.tails.next_turn(shape, "user")
            if following is not None and not following.startswith(literal):
                shared = self.endings.num_shared(literal, following)
                eos = self.endings.eos
                if eos is not None and literal.startswith(eos, shared):
                    shared += len(eos)
                shared = self._without_opening(literal, begin, shared)
                if self.endings.last(literal[begin:shared], one=True).ending:
                    size = shared
            remember(self._closings, key, size - begin)
        return begin + self._closings[key]

    def _named_by_next_turn(self, shape: Shape, turn: int) -> str:
        """Return the token of eot_tokens with which the turn behind the last answer would begin, or ""."""
        role = "tool" if shape.messages[turn].get("tool_calls") else "user"
        following = self.tails.next_turn(shape, role) if self.endings.named else None
        literal = shape.written.literals[-1]
        if following is None or not following.startswith(literal):
            return ""
        return self.endings.named_at_beginning(following[len(literal) :])

    def _called_size(self, shape: Shape, turn: int, upto: Messages, literal: str, begin: int) -> tuple[int, bool]:
        """Return where an answer without texts ends in the literal that it stands in, and whether its end is there too.

        Raises DataError if that cannot be told.
        """
        calls = shape.messages[turn].get("tool_calls")
        anchor = calls[-1]["function"]["name"] if calls else ""
        body = literal[begin:]
        # Calls are the row's own, so this is rendered for each row: with as little before it as will do.
        for some in (local_messages(upto), upto):
            try:
                tail = self.tails.tail(some, shape.tools, shape.prefix, behind=turn)
            except DataError:
                continue
            if literal.startswith(tail) and len(tail) >= begin:
                return len(tail), True
            # The beginning may be another where the answer is the last, such as an empty thought: compare the ends.
            size = _longest_end_within(tail, body)
            if size and anchor in tail[len(tail) - size :]:
                return begin + body.index(tail[len(tail) - size :]) + size, True
            given = self.tails.shared_with(shape, shape.messages[:turn], tail, behind=None)
            size = self.endings.num_shared(tail[given[0] :] if given is not None else tail, body)
            if anchor and anchor in body[:size]:
                return begin + size, False
        raise DataError(f"{_UNTOLD.format(f'where message {turn} ends')}. {MARK_ANSWERS}")

    def _no_ending(self, shape: Shape, turn: int, following: str, *, ends_with: str = "") -> str:
        """Return the error for a template that ends a trained turn with no token.

        `ends_with`: the turn's own text, if it is the last one and has no texts of the row behind which to look.
        """
        is_last = turn == len(shape.messages) - 1
        token = self.endings.added_at_end(ends_with)
        written = f"the chat template writes {following[:30]!r} after message {turn}, "
        begins = "but no token that ends the turn"
        if token:
            written = f"the chat template ends message {turn} with {token!r}, "
            begins = "which is none of the tokens that end a turn (`eot_tokens`)"
        elif is_last and (next_turn := self.tails.next_turn(shape, "user")) is not None:
            literal = shape.written.literals[-1] if ends_with else ""
            token = self.endings.added_at_beginning(next_turn.removeprefix(literal))
            begins = f"and the next turn begins with {token!r}, {begins}"
        else:
            token = self.endings.added_at_beginning(following)
            begins = f"the beginning of the next turn, {begins}"
        if token and token not in self.endings.named:
            named = ", ".join(repr(one) for one in sorted({*self.endings.named, token}))
            return (
                f"{written}{begins}: a model trained on it would not learn where to stop. If {token!r} is what ends "
                f"it, say so, and it is learned: `eot_tokens: [{named}]`"
            )
        return (
            f"{written}which does not begin with a token that ends a turn: a model trained on it would not learn where "
            "to stop. Use a template that ends turns with a special token, or name the one it ends them with "
            "(`eot_tokens: [...]`), and add it where the vocabulary lacks it (`tokens: [...]`)"
        )


_UNTOLD = (
    "the chat template writes the conversation so far otherwise than the same messages within this conversation, so it "
    "cannot be told {}"
)


def _longest_end_within(text: str, other: str) -> int:
    """Length of the longest end of a text that stands in another one, in characters."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[len(text) - middle :] in other else (low, middle - 1)
    return low


def _plan(literal: int, offset: int, ending: str = "", *, added: bool = False, no_ending: str = "") -> TurnPlan:
    border = Border(literal, offset)
    return TurnPlan(((border, border),), ending, added, no_ending=no_ending)
