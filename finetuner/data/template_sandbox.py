"""A chat template as a program: run as transformers runs it, within bounds of time and memory.

A template comes with a model from anywhere. jinja2's sandbox keeps it from reaching out, but not from looping for
hours or doubling a text until memory is gone. Here every turn of a loop, every call, and every text that is made counts
against a budget; what uses it up is refused like any template that raises.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from finetuner.data.formats import Span
from finetuner.data.messages import THOUGHTS
from finetuner.errors import DataError

MAX_STEPS = 2_000_000  # turns of loops and calls: seconds
MAX_CHARACTERS = 20_000_000  # of texts made on the way, and as much again for each character of the conversation
CHARACTERS_PER_GIVEN = 200
MAX_NUMBER = 1_000_000  # as an argument: a width to fill, a number of parts
# What stands around an answer in a rendered text until it is found; no row can know it.
_OPENED, _CLOSED = (f"\ue000{word}{secrets.token_hex(8)}\ue001" for word in ("a", "z"))
_SIZED = (str, list, tuple)  # what is measured
_THOUGHTS = frozenset(THOUGHTS)
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """Messages -> text. `known`: variables that every rendering has, such as bos_token."""

    def __init__(self, text: str, known: Mapping[str, Any]) -> None:
        self.text, self.known = text, dict(known)
        self.marks_answers = _MARKS.search(text) is not None
        self._environment = _Environment()
        with_limits = _Limits().visit(self._environment.parse(text))
        self._program = self._environment.from_string(with_limits)

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """Raises DataError if the template refuses the messages, fails, or takes more than its budget.

        `prompt`: with what asks for an answer behind them.
        """
        return self._run(messages, tools, prompt, "", "")

    def render_marked(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The text, and where its {% generation %} blocks stand. Raises DataError."""
        pieces = re.split(f"({_OPENED}|{_CLOSED})", self._run(messages, tools, False, _OPENED, _CLOSED))
        marks = pieces[1::2]
        if marks != [_OPENED, _CLOSED] * (len(marks) // 2):
            raise DataError("the chat template's {% generation %} blocks stand within each other")
        text, spans = pieces[0], []
        for answer, rest in zip(pieces[2::4], pieces[4::4], strict=True):
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
        return text, spans

    def _run(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, a: str, z: str) -> str:
        # copies: {% set _ = dict.update(message, ...) %} is not among what the sandbox forbids
        given = [dict(message) if _THOUGHTS.isdisjoint(message) else _with_thought(message) for message in messages]
        self._environment.begin(given, tools)
        values = {"messages": given, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._program.render(**{**self.known, **values, "_opened": a, "_closed": z})
        except DataError:
            raise
        except Exception as error:  # the template's own word, or any failure in its code
            raise DataError(f"the chat template refuses this conversation: {error}") from error


def compile_template(text: str, known: Mapping[str, Any]) -> ChatTemplate:
    """Raises DataError if the text is no template."""
    try:
        return ChatTemplate(text, known)
    except (jinja2.TemplateError, SecurityError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def _with_thought(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thought under the names that transformers gives it for templates."""
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return dict(message) if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers gives to chat templates, with the same filters and names, and a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.begin([], None)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self.measured,
            optimized=False,  # it would compute constants while compiling, beside the budget
        )
        self.filters |= {"tojson": _to_json, "_counted": self.counted, "_measured": self.measured, "_small": _small}
        del self.filters["format"]  # a width in its text would pass every measure
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def begin(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        self.steps = self.characters = 0
        self.given: Any = (messages, tools)

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise DataError(f"the chat template takes more than {MAX_STEPS:,} steps. It would not come to an end")

    def measured(self, value: Any) -> Any:
        if isinstance(value, _SIZED):
            self.characters += len(value)
            if self.characters > MAX_CHARACTERS:
                self._require_within_what_was_given()
        return value

    def _require_within_what_was_given(self) -> None:
        limit = MAX_CHARACTERS + CHARACTERS_PER_GIVEN * self._num_given
        if self.characters > limit:
            raise DataError(f"the chat template makes more than {limit:,} characters of this conversation")

    @property
    def _num_given(self) -> int:
        return len(json.dumps(self.given, default=str))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):  # most of all that templates do
            joined = left + right
            self.characters += len(joined)
            if self.characters > MAX_CHARACTERS:
                self._require_within_what_was_given()
            return joined
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, _SIZED) and isinstance(times, int) and len(text) * times > MAX_NUMBER:
                    raise SecurityError(f"{times} times a text of {len(text)}")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("a text's % is not for chat templates")
        if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise SecurityError(f"the power {right}")
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > 4096:
            raise SecurityError("a number of more than 4096 bits")
        return self.measured(made)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.step()
        for value in (*args, *kwargs.values()):
            _small(value)
        pattern = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps a text's format
        formats = getattr(obj, "__name__", "") in ("format", "format_map")
        if formats and isinstance(pattern, str) and re.search(r"\d{5}", pattern):
            raise SecurityError(f"the format {pattern[:40]!r}")
        return self.measured(super().call(context, obj, *args, **kwargs))


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: an answer, with a mark at either end when marks are asked for."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("_opened", "_closed")]
        return [marks[0], nodes.Scope(body, lineno=line), marks[1]]


class _Limits(NodeTransformer):
    """The program with its loops counted and the results of its filters measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the visitor's own naming
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_measured")

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.args = [_filtered(argument, "_small") for argument in node.args]
        for pair in node.kwargs:
            pair.value = _filtered(pair.value, "_small")
        return node if node.node is None else _filtered(node, "_measured")


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _small(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise SecurityError(f"{value} is too large a number for a chat template")
    return value


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
