"""`--key=value` and `--key value`, as other tools' command lines say it, read as the override `key=value`."""

import json
import re
from collections.abc import Sequence
from typing import Any

from finetuner.errors import RecipeError
from finetuner.export.merge_options import MERGE_KEYS
from finetuner.recipe.foreign.translate import ALIASES, MEANINGS
from finetuner.recipe.problems import near_words
from finetuner.recipe.schema import KEYS

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=", re.ASCII)
_TRUTH = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def read_options_as_overrides(command: Any, words: Sequence[str]) -> list[str]:
    """Return the words of a command's line with `--key value` of recipe keys as `key=value`, behind what is not.

    `command`: a command of click's. Its own options stay as they are, and so do all words of a command that takes no
    overrides. A flag that stands alone, such as `--bf16`, is true, and `--no-bf16` is false. Raises RecipeError for an
    option without a value.
    """
    if not any(parameter.name == "overrides" for parameter in command.params):
        return list(words)
    if not any(word.startswith("--") and len(word) > 2 for word in words):
        return list(words)
    return _Reader(command).read(words)


class _Reader:
    def __init__(self, command: Any) -> None:
        self.takes_value = {"--help": False}  # the command's own options
        self.num_arguments = -1  # before the overrides
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                self.num_arguments += 1
                continue
            for name in (*parameter.opts, *parameter.secondary_opts):
                self.takes_value[name] = not parameter.is_flag and not parameter.count

    def read(self, words: Sequence[str]) -> list[str]:
        arguments: list[str] = []
        own: list[str] = []
        overrides: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            name = word.partition("=")[0]
            if word == "--":
                overrides += rest
                break
            if name in self.takes_value:
                own.append(word)
                if self.takes_value[name] and "=" not in word and rest:
                    own.append(rest.pop(0))
            elif word.startswith("--"):
                if self._is_slip(name):
                    own.append(word)  # click says which of the command's options it is near to
                else:
                    overrides.append(self._override(word, rest, has_recipe=len(arguments) == self.num_arguments))
            elif re.match("-[A-Za-z]", word):
                own.append(word)
            elif len(arguments) < self.num_arguments:
                arguments.append(word)
            else:
                overrides.append(word)
        return [*own, "--", *arguments, *overrides]

    def _is_slip(self, name: str) -> bool:
        """Whether a word that is no key is near to one of the command's own options, and to no key."""
        key = _key(name)
        if _is_known(key) or _is_known(key.removeprefix("no_")):
            return False
        own = [option.removeprefix("--") for option in self.takes_value]
        return bool(near_words(key, own)) and not near_words(key, KEYS)

    def _override(self, word: str, rest: list[str], *, has_recipe: bool) -> str:
        """The override that an option stands for; its value is taken from the words behind it if it is there.

        `has_recipe`: the command's own arguments are there already, so that no word behind is one of them.
        """
        name, equals, value = word.partition("=")
        key = _key(name)
        if equals:
            return f"{key}={value}"
        if key.startswith("no_") and not _is_known(key) and _is_known(key.removeprefix("no_")):
            return f"{key.removeprefix('no_')}=false"
        kinds = _kinds(key)
        values: list[str] = []
        while rest and _is_value(rest[0], kinds, has_recipe) and (not values or ("tuple" in kinds and has_recipe)):
            values.append(rest.pop(0))
        if len(values) > 1:
            return f"{key}={json.dumps(values, ensure_ascii=False)}"
        if values:
            return f"{key}={values[0]}"
        if "bool" in kinds or not _is_known(key):  # of an unknown word it is said that it is unknown
            return f"{key}=true"
        raise RecipeError(f"{name} has no value. Write {name}=VALUE.")


def _key(option: str) -> str:
    """The key of `--learning-rate`: its words are joined by underscores."""
    return option.removeprefix("--").replace("-", "_")


def _is_value(word: str, kinds: str, has_recipe: bool) -> bool:
    """Whether a word behind an option is its value: not the next option or override, nor, behind a flag, the recipe."""
    if word.startswith("--") or _OVERRIDE.match(word):
        return False
    if "bool" not in kinds or word.lower() in _TRUTH or f"'{word}'" in kinds:
        return True
    return "str" in kinds and (has_recipe or not word.endswith((".yml", ".yaml")))


def _is_known(key: str) -> bool:
    head = key.split(".")[0]
    return head in KEYS or head in MEANINGS or head in MERGE_KEYS


def _kinds(key: str) -> str:
    """The types that a key takes, in Python's words; none where any word may be its value."""
    if key == "verify":
        return "bool"
    ours = ALIASES.get(key, key)
    if ours in KEYS:
        return str(KEYS[ours][1].annotation)
    return "" if "." in key or key in MERGE_KEYS else "bool | str"  # another tool's word may be a flag
