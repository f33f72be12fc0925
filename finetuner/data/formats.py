"""Row -> text, and which of its characters are trained on. One render per row; nothing is tokenised here."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetuner.data.sources import Row
from finetuner.errors import DataError

Span = tuple[int, int]  # [start, stop) in characters
Messages = list[dict[str, Any]]
RenderChat = Callable[[Messages], str]  # a tokenizer's chat template, as a function
RenderMarked = Callable[[Messages], tuple[str, list[Span]]]  # one with {% generation %} markers: text and marked spans


@dataclass(frozen=True)
class Rendered:
    """`spans` are trained on. `wraps` asks for the tokenizer's own begin and end of text; a chat template writes them
    itself, so that a second BOS would be one too many."""

    text: str
    spans: tuple[Span, ...]
    wraps: bool


def render_alpaca(row: Row) -> Rendered:
    """The Stanford Alpaca prompt (github.com/tatsu-lab/stanford_alpaca), with and without an input column."""
    instruction = _text(row, "instruction")
    answer = _text(row, "output")
    given = row.get("input")
    if given is None:  # no column, or an empty cell
        given = ""
    if not isinstance(given, str):
        raise DataError(f"column 'input' holds {_kind(given)}, but must be text")
    if given:
        intro = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
        )
        prompt = f"{intro}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    else:
        intro = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        )
        prompt = f"{intro}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    text = prompt + answer
    return Rendered(text, ((len(prompt), len(text)),), wraps=True)


def render_messages(
    row: Row, column: str, render: RenderChat, render_prompt: RenderChat, special_tokens: tuple[str, ...]
) -> Rendered:
    """Every assistant turn is trained on, with the special token that ends it. `render_prompt` is `render` as it is
    used to ask a model, with the head of the answer.

    The template runs twice: on the messages, and on stand-ins for their contents. What lies between the stand-ins is
    what the template itself writes, which fixes where each content begins and ends, whatever it says ("[[1, 2]]",
    a role's name, a copy of another turn). Linear in the length of the conversation.
    """
    messages = _messages(row, column)
    text = render(messages)
    skeleton, literals = _literals(messages, render)
    lead = _lead(skeleton, literals, render_prompt)
    spans: list[Span] = []
    at = 0
    for i, message in enumerate(messages):
        if not text.startswith(literals[i], at):
            raise DataError(_rewritten(i))
        start = at + len(literals[i])
        stop = _content_end(text, start, message["content"], literals[i + 1])
        if stop is None:
            raise DataError(_rewritten(i))
        if message["role"] == "assistant":
            led = len(lead) if literals[i].endswith(lead) else 0
            spans.append((start - led, stop + _end_of_turn(literals[i + 1], special_tokens, i)))
        at = stop
    if text[at:] != literals[-1]:
        raise DataError(_rewritten(len(messages) - 1))
    return Rendered(text, tuple(spans), wraps=False)


def render_marked_messages(row: Row, column: str, render: RenderMarked) -> Rendered:
    """As render_messages, for a template that marks the text to train on itself."""
    text, spans = render(_messages(row, column))
    return Rendered(text, tuple((start, stop) for start, stop in spans), wraps=False)


def _literals(messages: Messages, render: RenderChat) -> tuple[Messages, list[str]]:
    """Messages with stand-ins for their contents, and the template's own text before, between and after these."""
    joined = "\0".join(message["content"] for message in messages)
    salt = 0
    while f"q{salt}x" in joined:  # a stand-in must not occur in what it stands for
        salt += 1
    stand_ins = [f"q{salt}x{i}z" for i in range(len(messages))]
    skeleton = [{**m, "content": s} for m, s in zip(messages, stand_ins, strict=True)]
    pieces = re.split(f"q{salt}x([0-9]+)z", render(skeleton))
    if pieces[1::2] != [str(i) for i in range(len(messages))]:
        raise DataError(
            "the chat template does not write every message once and in order, so it cannot be told what each turn "
            "became. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
        )
    return skeleton, pieces[::2]


def _lead(skeleton: Messages, literals: list[str], render_prompt: RenderChat) -> str:
    """White space before an answer that a model is not given but writes itself: "[/INST] answer" answers "[/INST]"."""
    answers = (i for i, message in enumerate(skeleton) if message["role"] == "assistant")
    first = next(answers, 0)
    if first == 0:
        return ""
    try:
        prompt = render_prompt(skeleton[:first])
    except DataError:  # it asks for an answer to users only
        return ""
    contents = [message["content"] for message in skeleton[:first]]
    written = "".join(text for pair in zip(literals, contents, strict=False) for text in pair) + literals[first]
    lead = written.removeprefix(prompt)
    return lead if written.startswith(prompt) and lead.isspace() else ""


def _content_end(text: str, start: int, content: str, following: str) -> int | None:
    """Where the content ends: as it stands, or as a template that trims it writes it."""
    for variant in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
        if text.startswith(variant + following, start):
            return start + len(variant)
    return None


def _end_of_turn(following: str, special_tokens: tuple[str, ...], turn: int) -> int:
    """Length of the special token that ends a turn, with white space before it. Without it the model never stops."""
    blank = len(following) - len(following.lstrip())
    ending = max((t for t in special_tokens if following.startswith(t, blank)), key=len, default=None)
    if ending is None:
        raise DataError(
            f"the chat template writes {following[:30]!r} after message {turn}, which does not begin with a special "
            "token: a model trained on it would not learn where to stop. Use a template that ends turns with one"
        )
    return blank + len(ending)


def _rewritten(turn: int) -> str:
    return (
        f"the chat template changes the text of message {turn} (more than trimming it), so it cannot be told which "
        "tokens are its own. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
    )


def _messages(row: Row, column: str) -> Messages:
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"column '{column}' holds {_kind(messages)}, but must be a list of messages")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(
                f"message {i} of column '{column}' must have text in 'role' and 'content'; it is {message!r:.150}"
            )
        # `datasets` gives every message the keys of all; a key that is null here was not in this one
        out.append({key: value for key, value in message.items() if value is not None})
    return out


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {_kind(value)}, but must be text")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
