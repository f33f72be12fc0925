"""`key=value` on the command line, written into a recipe's values as if it stood in the file."""

import re
from itertools import pairwise
from typing import Any

from finetuner.recipe.foreign.translate import ALIASES
from finetuner.recipe.problems import KeyPath, Origin, Problem
from finetuner.recipe.yaml_document import YamlDocument, end_of_value, parse_value

_INDEX = re.compile("[0-9]{1,6}")
_LISTS = {"pretraining_dataset": "datasets"}  # lists of other tools that become one of ours


def apply_override(document: YamlDocument, number: int, override: str) -> None:
    """Write one override into the document's values; what is wrong with it joins the document's problems.

    `number`: which of the overrides it is, from 1, for messages. A dotted key reaches into blocks and lists; missing
    blocks on its way are made.
    """
    origin = Origin(f"override {number}", text=override)
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        document.problems.append(Problem("an override is written key=value, such as learning_rate=1e-4.", origin))
        return
    try:
        value = _value(text)
    except ValueError as error:
        reason = str(error).removeprefix("not valid YAML: ")
        message = f"the value is not YAML: {reason} To write it as text: {key}='\"...\"'"
        document.problems.append(Problem(message, origin))
        return
    path: KeyPath = tuple(int(part) if _INDEX.fullmatch(part) else part for part in key.split("."))
    if len(path) == 1:
        _drop_other_names(document, path[0])
    first = path[0]
    is_new = document.values.get(first) is None if isinstance(first, str) else False
    if not _write(_container(document.values, path), path[-1], value):
        message = f"the recipe has no place '{key}' to write to."
        if is_new:  # what was made on the way would be an error of its own
            document.values.pop(str(first), None)
            message += _advice(str(first), path)
        document.problems.append(Problem(message, origin))
        return
    _note_origin(document, path, origin)


def _value(text: str) -> Any:
    """The value behind `key=`. Raises ValueError with the reason.

    A line of a command has no comments: `runs/a #1` is the name of a folder.
    """
    stated = text.strip()
    if "#" not in stated or "\n" in stated:
        return parse_value(text)
    end = end_of_value(stated)
    if end == len(stated):
        return parse_value(text)
    if stated[0] in "\"'[{":
        raise ValueError(
            f"the value ends before '{stated[end:].strip()[:40]}', and there are no comments in an override."
        )
    return stated


def _drop_other_names(document: YamlDocument, key: Any) -> None:
    """Remove what the file says under another name of the same key: the override replaces it."""
    ours = ALIASES.get(key, key)
    for name in [name for name in document.values if name != key and ALIASES.get(name, name) == ours]:
        del document.values[name]


def _advice(first: str, path: KeyPath) -> str:
    """Return a further sentence that says what to write for a path into a key that the recipe does not have."""
    ours = _LISTS.get(first) or ALIASES.get(first)
    if ours is not None:
        return f" '{first}' is called {ours} here: {'.'.join(map(str, (ours, *path[1:])))}=..."
    return f" It has no list '{first}': write it whole ({first}='[...]')."


def _container(values: dict[str, Any], path: KeyPath) -> Any:
    """The block or list that the last step of `path` is in, or None if the way there is barred by a plain value."""
    container: Any = values
    for step, following in pairwise(path):
        if isinstance(container, dict) and isinstance(step, str):
            if container.get(step) is None:
                container[step] = [] if isinstance(following, int) else {}
            container = container[step]
        elif isinstance(container, list) and isinstance(step, int) and step < len(container):
            container = container[step]
        else:
            return None
    return container


def _write(container: Any, step: str | int, value: Any) -> bool:
    """Set a key of a block or an entry of a list, which may be one after its last; whether there was such a place."""
    if isinstance(container, dict) and isinstance(step, str):
        container[step] = value
    elif isinstance(container, list) and isinstance(step, int) and step <= len(container):
        container[step:] = [value, *container[step + 1 :]]
    else:
        return False
    return True


def _note_origin(document: YamlDocument, path: KeyPath, origin: Origin) -> None:
    """Let errors about `path`, or about blocks that were made on the way, show the override."""
    for end in range(1, len(path) + 1):
        document.keys.setdefault(path[:end], origin)
        document.places.setdefault(path[:end], origin)
    document.keys[path] = document.places[path] = origin
    for table in (document.keys, document.places):  # the file's lines below the overridden place say nothing now
        for stale in [place for place in table if len(place) > len(path) and place[: len(path)] == path]:
            del table[stale]
