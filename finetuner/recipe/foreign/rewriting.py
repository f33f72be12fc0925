"""Keys of another tool that mean something only together, while they are rewritten.

A table of Foreign says the meaning of one key. Where the meaning of one depends on others (a dataset's name, its split
and its columns; an adapter and its layers; an upload and its repository) the tool has a function that takes those keys
out of the document and puts ours in their place, before the table is read.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from finetuner.recipe.problems import Note, Problem
from finetuner.recipe.yaml_document import YamlDocument

# The first row of an entry of `datasets`, if the dataset lies on this disk; None if it does not, or cannot be read.
FirstRow = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


def no_rows(entry: Mapping[str, Any]) -> None:
    """The FirstRow of a caller that has no rows at hand."""
    return


class Rewriting:
    """A document whose keys are taken and replaced; `notes` and `defaults` grow as it goes.

    given: the keys of the recipe. defaults: our keys for what the tool does although the recipe does not say it.
    remarks: what someone who reads the converted recipe has to know, beside the notes on single keys.
    """

    def __init__(self, document: YamlDocument, first_row: FirstRow = no_rows) -> None:
        self.document, self.first_row, self.given = document, first_row, frozenset(document.values)
        self.notes: list[Note] = []
        self.defaults: dict[str, Any] = {}
        self.remarks: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` where it is missing or empty."""
        value = self.document.values.get(key)
        return default if value is None else value

    def take(self, key: str, default: Any = None, *, into: str = "") -> Any:
        """Take a key out of the document; return its value, or `default` where it is missing or empty.

        `into`: our key that the value goes into, which a note says.
        """
        value = self.document.values.pop(key, None)
        if into and value is not None:
            origin = self.document.origin((key,), of_key=True)
            self.notes.append(Note((key,), f"is read as part of `{into}`", origin, quiet=True))
        return default if value is None else value

    def put(self, ours: str, value: Any, *, of: str, quiet: bool = False) -> None:
        """Write a key of ours, at the place of the key `of`, which said it."""
        origin = self.document.origin((of,), of_key=True)
        self.document.values[ours] = value
        if origin is not None:
            self.document.keys[(ours,)] = self.document.places[(ours,)] = origin
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        said = f"{said.splitlines()[0][:60]} ..." if "\n" in said or len(said) > 100 else said
        if (of, value) != (ours, value):
            self.notes.append(Note((of,), f"is read as `{ours}: {said}`", origin, quiet=quiet))

    def ignore(self, key: str, reason: str, *, loud: bool = False) -> None:
        """Take a key out of the document, and say why nothing is lost by that. A key that is not there is no matter."""
        if key in self.document.values:
            origin = self.document.origin((key,), of_key=True)
            value = self.document.values.pop(key)
            self.notes.append(
                Note((key,), f"without effect: {reason}", origin, quiet=not loud or value in (None, False))
            )

    def refuse(self, key: str, message: str) -> None:
        """Take a key out of the document, and say at its place why the recipe cannot be converted."""
        self.document.values.pop(key, None)
        self.document.problems.append(Problem(message, self.document.origin((key,), of_key=True)))

    def require_truth(self, keys: str) -> None:
        """Refuse those of the keys, written as one text, whose value is not true or false.

        `use_peft: yes` is true to the parsers of other tools and a text in YAML 1.2; taken for false it would be
        dropped without a word.
        """
        for key in keys.split():
            value = self.get(key)
            if value is not None and not isinstance(value, bool):
                word = f"the text '{value}'" if isinstance(value, str) else f"{value!r:.40}"
                self.refuse(key, f"{key} is {word}, but must be true or false.")

    def remark(self, text: str) -> None:
        """Say something that has to be known of the converted recipe, and is not about one of its keys."""
        self.remarks.append(text)
        self.notes.append(Note((), text))
