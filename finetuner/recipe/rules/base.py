"""The contract of a rule: validated values in, findings out."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from finetuner.recipe.problems import KeyPath

Values = Mapping[str, Any]  # key -> validated value; a key in error is missing


class Finding(NamedTuple):
    """A mistake that no key has by itself, shown at `where`, the key to change, with the lines of `also`."""

    where: KeyPath
    message: str
    also: tuple[KeyPath, ...] = ()


Rule = tuple[tuple[str, ...], Callable[[Values], Iterator[Finding]]]  # the keys it needs, and the rule


def one_of(first: str, second: str, why: str) -> Rule:
    """Return the rule that at most one of two keys is given."""

    def rule(values: Values) -> Iterator[Finding]:
        if values[first] is not None and values[second] is not None:
            yield Finding((second,), f"{first} and {second} are both given: {why}. Remove one.", ((first,),))

    return (first, second), rule
