"""Parses YAML text into plain values, and the place of every key and value in the text.

YAML 1.2, so that `2e-4` is a number and `no` is text. Duplicate keys, other tags than the core ones, several documents
and texts that would grow without bound are refused.
"""

from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from finetuner.recipe.problems import KeyPath, Origin, Problem

MAX_RECIPE_BYTES = 300_000
# An alias may be expanded many times over ("billion laughs"): bound what comes out, not only what goes in.
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_INT = 2**63 - 1
TOO_MUCH = (
    f"a recipe nests at most {MAX_DEPTH} blocks and has at most {MAX_NODES:,} values, with aliases written out; "
    "this has more."
)


@dataclass
class YamlDocument:
    """A parsed recipe: its values, and the places of its keys and of their values.

    is_complete: all of its values are here, whatever the problems.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, Origin] = field(default_factory=dict)
    places: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    is_complete: bool = False

    def origin(self, path: KeyPath, *, of_key: bool = False) -> Origin | None:
        """Return the nearest place that is known for `path`: its own, else that of the block it is missing from."""
        table = self.keys if of_key else self.places
        for end in range(len(path), 0, -1):
            if path[:end] in table:
                return table[path[:end]]
            if path[:end] in self.keys:
                return self.keys[path[:end]]
        return None


def parse_yaml(text: str, source: str) -> YamlDocument:
    """Parse one YAML mapping. Problems are in the result, never raised."""
    document = YamlDocument(source)
    try:
        excess = _first_excess(text, source)
        if excess is not None:
            document.problems.append(excess)
            return document
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error, text, source))
        return document
    except (YAMLError, ValueError, OverflowError) as error:  # the last two: "\UFFFFFFFF" is no character
        document.problems.append(Problem(f"{source} is not YAML text: {str(error).splitlines()[0]}"))
        return document
    if root is None:
        document.is_complete = True
        return document
    if not isinstance(root, MappingNode):
        document.problems.append(
            Problem("a recipe is a list of `key: value` lines; this is not one.", Origin(source, 1, 1, _line(text, 1)))
        )
        return document
    builder = _Builder(document, text.splitlines())
    document.values = builder.mapping(root, (), 0)
    document.is_complete = builder.num_nodes <= MAX_NODES
    return document


def parse_value(text: str) -> Any:
    """Parse one YAML value, as written after `key=` on the command line. Raises ValueError with the reason."""
    document = parse_yaml("value: " + text if "\n" not in text else "value:\n" + indent(text, " "), "override")
    if document.problems:
        raise ValueError(document.problems[0].message.removesuffix(_HINT))
    return document.values.get("value")


def end_of_value(text: str) -> int:
    """Return where the YAML value ends that a line begins with: what follows is a comment. 0 if it is all comment."""
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except YAMLError:
        return len(text)  # parse_value says what is wrong
    return 0 if node is None else int(node.end_mark.index)


class _Builder:
    """Builds plain values from the node tree in one walk, and counts the nodes that come out."""

    def __init__(self, document: YamlDocument, lines: list[str]) -> None:
        self.document, self.lines, self.num_nodes = document, lines, 0
        self.constructor = YAML(typ="safe", pure=True).constructor

    def value(self, node: Node, path: KeyPath, depth: int) -> Any:
        self.num_nodes += 1
        if depth > MAX_DEPTH or self.num_nodes > MAX_NODES:
            self.problem(TOO_MUCH, node)
            self.num_nodes = MAX_NODES + 1  # ends every loop above
            return None
        kind = str(node.tag).rpartition(":")[2]
        if kind not in _KINDS:
            self.problem(f"the tag {node.tag} is not supported; write the value plainly.", node)
            return None
        if isinstance(node, MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            items = []
            for i, child in enumerate(node.value):
                if self.num_nodes > MAX_NODES:
                    break
                self.document.places[(*path, i)] = self.origin(child)
                items.append(self.value(child, (*path, i), depth + 1))
            return items
        assert isinstance(node, ScalarNode)
        return self.scalar(node, kind)

    def mapping(self, node: MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if self.num_nodes > MAX_NODES:
                break
            key = key_node.value if isinstance(key_node, ScalarNode) else "?"
            here = (*path, key)
            if key in out:
                first = self.document.keys[here]
                self.problem(f"'{key}' is given twice; line {first.line} has it already. Remove one.", key_node)
                continue
            self.document.keys[here] = self.origin(key_node)
            self.document.places[here] = self.origin(value_node)
            out[key] = self.value(value_node, here, depth + 1)
        return out

    def scalar(self, node: ScalarNode, kind: str) -> Any:
        if kind == "timestamp":  # 2024-01-01 is a name here, not a date
            return node.value
        try:
            value = self.constructor.construct_object(node)
        except (YAMLError, ValueError, LookupError):  # `!!int abc`, or 5,000 digits
            value = None
            self.problem(f"'{node.value[:60]}' is not of the kind '{kind}'; write the value plainly.", node)
        if isinstance(value, int) and abs(value) > MAX_INT:
            self.problem(f"a whole number is at most {MAX_INT} here.", node)
            return None
        return value

    def origin(self, node: Node) -> Origin:
        return _origin(node, self.document.source, self.lines)

    def problem(self, message: str, node: Node) -> None:
        self.document.problems.append(Problem(message, self.origin(node)))


_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")


def _first_excess(text: str, source: str) -> Problem | None:
    """The first place where composing the text would nest or grow without bound, or let one anchor replace another."""
    lines = text.splitlines()
    depth = num_nodes = 0
    anchors: set[str] = set()
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent)
        depth -= isinstance(event, CollectionEndEvent)
        if not isinstance(event, NodeEvent):
            continue
        num_nodes += 1
        if depth > MAX_DEPTH or num_nodes > MAX_NODES:
            return Problem(TOO_MUCH, _origin(event, source, lines))
        if event.anchor in anchors and not isinstance(event, AliasEvent):
            return Problem(f"the anchor '&{event.anchor}' is given twice. Rename one.", _origin(event, source, lines))
        if event.anchor is not None:
            anchors.add(event.anchor)
    return None


def _origin(node: Node | NodeEvent, source: str, lines: list[str]) -> Origin:
    mark = node.start_mark
    text = lines[mark.line] if mark.line < len(lines) else ""
    return Origin(source, mark.line + 1, mark.column + 1, text)


_HINT = " Check the indentation and the quotes here and one line above."


def _syntax_problem(error: MarkedYAMLError, text: str, source: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    shown = _line(text, line)
    what = str(error.problem or error.context or "not valid YAML").rstrip(".")
    hint = " Indent with spaces, not tabs." if "\t" in shown else _HINT
    if "${" in shown:
        hint = ' Write a text with ${...} in quotes: "${env:NAME}".'
    return Problem(f"not valid YAML: {what}.{hint}", Origin(source, line, column, shown.replace("\t", " ")))


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1] if 0 < number <= len(lines) else ""
