"""Conversation -> text by a chat template, and which of its characters are trained on.

A plain conversation is rendered once, and once more on stand-ins for its contents. What lies between the stand-ins is
what the template itself writes, which fixes where each content begins and ends, whatever it says ("[[1, 2]]", a
role's name, a copy of another turn). Conversations with the same roles share that second rendering. Where messages
hold more than a text (tool calls, thoughts), a turn's place is where the renderings of the messages up to it end.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetuner.data.formats import Rendered, Span
from finetuner.data.messages import Conversation, Messages
from finetuner.errors import DataError
from finetuner.recipe.sections.datasets import Ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_REMEMBERED = 2048
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EndsOfTurns:
    """Which tokens end a turn, and which of these ends are trained on: `of_text` rules where the token is the
    tokenizer's end-of-text, `of_turn` where it is another."""

    tokens: tuple[str, ...]
    eos: str | None
    of_text: Ends = "turn"
    of_turn: Ends = "turn"

    def after(self, text: str) -> str:
        """The token with which `text` begins, with white space before it; "" if there is none."""
        blank = len(text) - len(text.lstrip())
        return text[:blank] + max((t for t in self.tokens if text.startswith(t, blank)), key=len, default="") or ""

    def policy(self, ending: str) -> Ends:
        return self.of_text if ending.strip() == self.eos else self.of_turn


@dataclass(frozen=True)
class _Skeleton:
    """What the template writes before, between and after the contents; the ending of each turn; and `lead`, white space
    before an answer that a model is not given but writes itself ("[/INST] answer" answers "[/INST]")."""

    literals: list[str]
    endings: list[str]
    lead: str


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer's chat template, and what is learned of its text."""

    tokenizer: "PreTrainedTokenizerBase"
    ends: EndsOfTurns
    kwargs: Mapping[str, Any]
    only_answers: bool  # by role, with the ends of turns, as {% generation %} markers have it
    _remembered: dict[str, _Skeleton] = field(default_factory=dict)

    def render(self, conversation: Conversation) -> Rendered:
        """Raises DataError if the template refuses the conversation, or it cannot be told which text is whose."""
        template = str(self.tokenizer.chat_template)
        self._require_understood(conversation, template)
        by_role = all(
            wish == (message["role"] == "assistant")
            for wish, message in zip(conversation.trained, conversation.messages, strict=True)
        )
        if _MARKS.search(template) and self.only_answers and by_role:
            text, spans = self._marked(conversation)
            return Rendered(
                text, tuple((a, b) for a, b in spans), wraps=False, contents=self._known(conversation, text)
            )
        return self._by_contents(conversation) if conversation.plain else self._by_prefixes(conversation)

    def _text(self, messages: Messages, tools: list[Any] | None, *, prompt: bool = False) -> str:
        with _the_templates_word():
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self.kwargs
                )
            )

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        known: Any = self.tokenizer.special_tokens_map
        with _the_templates_word():
            result: Any = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **{**known, **self.kwargs},
            )
        texts, spans = result
        return texts[0], spans[0]

    def _require_understood(self, conversation: Conversation, template: str) -> None:
        """A template that does not know of tools or thoughts leaves them out without a word."""
        has = {key for message in conversation.messages for key in message} | (
            {"tools"} if conversation.tools else set()
        )
        for key in ("tools", "tool_calls", "reasoning_content"):
            if key in has and key not in template:
                raise DataError(
                    f"the chat template does not write {key}, so the row's would be left out. Take a tokenizer whose "
                    "template does, or name one with chat_template_jinja"
                )

    # --- plain conversations ---

    def _by_contents(self, conversation: Conversation) -> Rendered:
        text = self._text(conversation.messages, conversation.tools)
        skeleton = self._skeleton(conversation)
        contents = _find_contents(text, conversation.messages, skeleton.literals)
        bodies = [
            (start - len(skeleton.lead) if literal.endswith(skeleton.lead) else start, stop)
            for (start, stop), literal in zip(contents, skeleton.literals[:-1], strict=True)
        ]
        spans = self._trained_spans(conversation.trained, bodies, skeleton.endings, skeleton.literals[1:])
        return Rendered(text, spans, wraps=False, contents=contents)

    def _known(self, conversation: Conversation, text: str) -> tuple[Span, ...]:
        """Where the contents stand in the text of a template that marks the answers itself, if that can be told."""
        if not conversation.plain:
            return ()
        try:
            return _find_contents(text, conversation.messages, self._skeleton(conversation).literals)
        except DataError:
            return ()

    def _skeleton(self, conversation: Conversation) -> _Skeleton:
        messages = conversation.messages
        joined = "\0".join(message["content"] for message in messages)
        salt = 0
        while f"q{salt}x" in joined:  # a stand-in must not occur in what it stands for
            salt += 1
        stand_ins = [f"q{salt}x{i}z" for i in range(len(messages))]
        mocked = [{**m, "content": s} for m, s in zip(messages, stand_ins, strict=True)]
        key = json.dumps([mocked, conversation.tools], default=repr)
        if key not in self._remembered:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            pieces = re.split(f"q{salt}x([0-9]+)z", self._text(mocked, conversation.tools))
            if pieces[1::2] != [str(i) for i in range(len(messages))]:
                raise DataError(
                    "the chat template does not write every message once and in order, so it cannot be told what each "
                    "turn became. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
                )
            literals = pieces[::2]
            lead = self._lead(mocked, literals, conversation.tools)
            self._remembered[key] = _Skeleton(literals, [self.ends.after(text) for text in literals[1:]], lead)
        return self._remembered[key]

    def _lead(self, mocked: Messages, literals: list[str], tools: list[Any] | None) -> str:
        first = next((i for i, message in enumerate(mocked) if message["role"] == "assistant"), 0)
        if first == 0:
            return ""
        try:
            prompt = self._text(mocked[:first], tools, prompt=True)
        except DataError:  # it asks for an answer to users only
            return ""
        contents = [message["content"] for message in mocked[:first]]
        written = "".join(text for pair in zip(literals, contents, strict=False) for text in pair) + literals[first]
        lead = written.removeprefix(prompt)
        return lead if written.startswith(prompt) and lead.isspace() else ""

    # --- conversations with tool calls or thoughts ---

    def _by_prefixes(self, conversation: Conversation) -> Rendered:
        messages, tools = conversation.messages, conversation.tools
        text = self._text(messages, tools)
        bodies, endings = [], []
        for i, trained in enumerate(conversation.trained):
            if not trained:
                bodies.append((0, 0))
                endings.append("")
                continue
            asked = self._text(messages[:i], tools, prompt=True) if i else ""
            said = self._text(messages[: i + 1], tools) if i + 1 < len(messages) else text
            if not i or not said.startswith(asked) or not text.startswith(said.rstrip()):
                raise DataError(_rewritten(i))
            stop = len(said.rstrip())
            ending = max((t for t in self.ends.tokens if said.endswith(t, len(asked), stop)), key=len, default="")
            bodies.append((len(asked), stop - len(ending)))
            endings.append(ending)
        following = [text[stop : stop + 30] for _, stop in bodies]
        return Rendered(text, self._trained_spans(conversation.trained, bodies, endings, following), wraps=False)

    # --- both ---

    def _trained_spans(
        self, trained: tuple[bool, ...], bodies: list[Span], endings: list[str], following: list[str]
    ) -> tuple[Span, ...]:
        """What is learned of turns whose text stands at `bodies`, each followed by its ending."""
        last = max((i for i, wish in enumerate(trained) if wish), default=-1)
        spans = []
        for i, ((start, stop), ending) in enumerate(zip(bodies, endings, strict=True)):
            policy = self.ends.policy(ending)
            if trained[i] and not ending.strip() and (policy in ("turn", "all") or (policy == "last" and i == last)):
                raise DataError(_endless(i, following[i]))
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


def _find_contents(text: str, messages: Messages, literals: list[str]) -> tuple[Span, ...]:
    """Where each message's content stands between the template's own texts; DataError if it changed them."""
    contents = []
    at = 0
    for i, message in enumerate(messages):
        start = at + len(literals[i])
        stop = _content_end(text, start, message["content"], literals[i + 1])
        if not text.startswith(literals[i], at) or stop is None:
            raise DataError(_rewritten(i))
        contents.append((start, stop))
        at = stop
    if text[at:] != literals[-1]:
        raise DataError(_rewritten(len(messages) - 1))
    return tuple(contents)


def _content_end(text: str, start: int, content: str, following: str) -> int | None:
    """Where the content ends: as it stands, or as a template that trims it writes it."""
    for variant in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
        if text.startswith(variant + following, start):
            return start + len(variant)
    return None


def _endless(turn: int, following: str) -> str:
    return (
        f"the chat template writes {following[:30]!r} after message {turn}, which does not begin with a token that "
        "ends a turn: a model trained on it would not learn where to stop. Use a template that ends turns with a "
        "special token, name the one it ends them with (`eot_tokens: [...]`), or add it (`tokens: [...]`)"
    )


def _rewritten(turn: int) -> str:
    return (
        f"the chat template changes the text of message {turn} (more than trimming it), so it cannot be told which "
        "tokens are its own. Mark the answers in the template with {% generation %} ... {% endgeneration %}"
    )


@contextmanager
def _the_templates_word() -> Iterator[None]:
    """A template is a program that came with the tokenizer; what it raises says which conversation it does not take."""
    try:
        yield
    except Exception as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error


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
