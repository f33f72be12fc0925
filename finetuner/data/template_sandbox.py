"""Render chat templates as transformers does, within a budget of time and memory.

A template comes with a model from anywhere. jinja2's sandbox keeps it from the system, but not from looping for hours
or doubling a text until memory is full. Here every iteration of a loop, every call, and every text that is built counts
against a budget, and a template that uses it up is refused like one that raises.
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

from finetuner.data.formats.base import Span
from finetuner.data.messages import THOUGHTS
from finetuner.errors import DataError

MAX_STEPS = 2_000_000  # iterations and calls of one rendering: some seconds
MAX_CHARACTERS = 20_000_000  # of all texts built by one rendering
EXTRA_CHARACTERS_PER_INPUT = 200  # allowed on top for each character of the conversation
MAX_NUMBER = 1_000_000  # as an argument, such as a width to fill
# Marks around an answer in a rendered text; random, so that no row can contain one.
_START_MARK, _END_MARK = (f"\ue000{word}{secrets.token_hex(8)}\ue001" for word in ("a", "z"))
_SIZED = (str, list, tuple)  # counted against MAX_CHARACTERS
_THOUGHTS = frozenset(THOUGHTS)
THOUGHT_NAMES = (*THOUGHTS, "thought", "thoughts", "think")  # by which templates look for a message's thought
THOUGHT_ENDS = "</think>"
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """A compiled chat template. `variables` are given to every rendering, such as bos_token.

    asks: it knows of add_generation_prompt. thought_names: keys of a message by which it looks for a thought.
    """

    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        self.text, self.variables = text, dict(variables)
        self.marks_answers = _GENERATION_TAG.search(text) is not None
        self.asks = "add_generation_prompt" in text
        self.looks_for_thoughts_in_text = THOUGHT_ENDS in text
        self.thought_names = tuple(name for name in THOUGHT_NAMES if _is_key(name, text))
        self._environment = _Environment()
        with_limits = _LimitInserter().visit(self._environment.parse(text))
        self._program = self._environment.from_string(with_limits)

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """Return the text of messages; `prompt`: with the text that asks for an answer after them.

        Raises DataError if the template refuses the messages, fails, or exceeds its budget.
        """
        return self._run(messages, tools, prompt, "", "")

    def render_marked(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """Return the text, and the characters of its {% generation %} blocks. Raises DataError as `render` does."""
        pieces = re.split(f"({_START_MARK}|{_END_MARK})", self._run(messages, tools, False, _START_MARK, _END_MARK))
        marks = pieces[1::2]
        if marks != [_START_MARK, _END_MARK] * (len(marks) // 2):
            raise DataError("the chat template's {% generation %} blocks stand within each other")
        text, spans = pieces[0], []
        for answer, rest in zip(pieces[2::4], pieces[4::4], strict=True):
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
        return text, spans

    def _run(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, start_mark: str, end_mark: str
    ) -> str:
        # copies: the sandbox does not forbid {% set _ = dict.update(message, ...) %}
        copies = [
            dict(message) if _THOUGHTS.isdisjoint(message) else _with_thought(message, self.thought_names)
            for message in messages
        ]
        self._environment.reset_budget(copies, tools)
        values = {"messages": copies, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        marks = {"_start_mark": start_mark, "_end_mark": end_mark}
        try:
            return self._program.render(**{**self.variables, **values, **marks})
        except DataError:
            raise
        except Exception as error:  # raise_exception in the template, or any failure in its code
            raise DataError(f"the chat template refuses this conversation: {error}") from error


def compile_template(text: str, variables: Mapping[str, Any]) -> ChatTemplate:
    """Return the template. Raises DataError if the text is no template."""
    try:
        return ChatTemplate(text, variables)
    except (jinja2.TemplateError, SecurityError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def _is_key(name: str, text: str) -> bool:
    """Return whether a template reads this key of something: x.name, x['name'], x.get("name"), 'name' in x."""
    return re.search(rf"""\.{name}\b|['"]{name}['"]""", text) is not None


def _with_thought(message: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the message with its thought under the names by which the template looks for it.

    And under those that transformers gives it.
    """
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **dict.fromkeys(names, thought), **message, "reasoning_content": thought}


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, with the same filters and globals, and a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.reset_budget([], None)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self.count_characters,
            optimized=False,  # constants would be computed while compiling, outside the budget
        )
        self.filters |= {
            "tojson": _to_json,
            "_count_steps": self.count_steps,
            "_count_characters": self.count_characters,
            "_require_small": _require_small,
        }
        del self.filters["format"]  # a width in its pattern would not be counted
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }

    def reset_budget(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        """Count from 0, for a rendering of these messages."""
        self.num_steps = self.num_characters = 0
        self.inputs: Any = (messages, tools)

    def count_steps(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop, counting each as a step."""
        for value in values:
            self._count_step()
            yield value

    def _count_step(self) -> None:
        self.num_steps += 1
        if self.num_steps > MAX_STEPS:
            raise DataError(f"the chat template takes more than {MAX_STEPS:,} steps. It would not come to an end")

    def count_characters(self, value: Any) -> Any:
        """Return the value, after its size was counted."""
        if isinstance(value, _SIZED):
            self._add_characters(len(value))
        return value

    def _add_characters(self, count: int) -> None:
        self.num_characters += count
        if self.num_characters > MAX_CHARACTERS:
            input_size = len(json.dumps(self.inputs, default=str))
            limit = MAX_CHARACTERS + EXTRA_CHARACTERS_PER_INPUT * input_size
            if self.num_characters > limit:
                raise DataError(f"the chat template makes more than {limit:,} characters of this conversation")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation of `intercepted_binops`, unless its result would be too large to build."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):  # most operations of templates
            joined = left + right
            self._add_characters(len(joined))
            return joined
        _require_small_result(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 4096:
            raise SecurityError("a number of more than 4096 bits")
        return self.count_characters(result)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template, unless an argument is too large a number."""
        self._count_step()
        for value in (*args, *kwargs.values()):
            _require_small(value)
        pattern = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        is_format = getattr(obj, "__name__", "") in ("format", "format_map")
        if is_format and isinstance(pattern, str) and re.search(r"\d{5}", pattern):
            raise SecurityError(f"the format {pattern[:40]!r}")
        return self.count_characters(super().call(context, obj, *args, **kwargs))


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: an answer, with the marks of the rendering around it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("_start_mark", "_end_mark")]
        return [marks[0], nodes.Scope(body, lineno=line), marks[1]]


class _LimitInserter(NodeTransformer):
    """A visitor that inserts the filters which count iterations and sizes into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the visitor's own naming
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _apply_filter(node.iter, "_count_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _apply_filter(node, "_count_characters")

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.args = [_apply_filter(argument, "_require_small") for argument in node.args]
        for pair in node.kwargs:
            pair.value = _apply_filter(pair.value, "_require_small")
        return node if node.node is None else _apply_filter(node, "_count_characters")


def _apply_filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _require_small_result(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError for an operation whose result would be too large: a repeated text, a format, a power."""
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, _SIZED) and isinstance(times, int) and len(text) * times > MAX_NUMBER:
                raise SecurityError(f"{times} times a text of {len(text)}")
    if operator == "%" and isinstance(left, str):
        raise SecurityError("a text's % is not for chat templates")
    if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
        raise SecurityError(f"the power {right}")


def _require_small(value: Any) -> Any:
    """Return the value. Raises SecurityError if it is a number above MAX_NUMBER."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise SecurityError(f"{value} is too large a number for a chat template")
    return value


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
