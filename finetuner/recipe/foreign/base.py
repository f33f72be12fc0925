"""The meaning of one key of another tool here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Foreign:
    """Exactly one of `becomes`, `translate`, `without_effect` and `unsupported` says what happens to the key.

    becomes: our key with the same values. translate: the value -> our keys and their values.
    without_effect: accepted, and why nothing is lost by that. unsupported: what cannot be done here.
    instead: what to write or do. says_nothing: values that only spell the default out, besides null, false and empty.
    only_value: the one value that says what holds here; every other one but null, false among them, is refused.
    loud: someone set this key without effect in order to gain something, so that it is noted even without -v.
    """

    becomes: str | None = None
    translate: Callable[[Any], Mapping[str, Any]] | None = None
    without_effect: str | None = None
    unsupported: str | None = None
    instead: str = ""
    says_nothing: tuple[Any, ...] = ()
    only_value: Any = None
    loud: bool = False

    def __post_init__(self) -> None:
        meanings = (self.becomes, self.translate, self.without_effect, self.unsupported)
        assert sum(meaning is not None for meaning in meanings) == 1, "a foreign key means one thing"

    def is_off(self, value: Any) -> bool:
        """Whether the value asks for nothing: `rl:`, `load_in_8bit: false`, `fsdp: []`."""
        if self.only_value is not None:
            return value is None or value is self.only_value
        return value in (None, False, "", [], {}) or any(value is said or value == said for said in self.says_nothing)


Table = Mapping[str, Foreign]


def renamed(key: str) -> Foreign:
    """A key that is `key` here, with the same values."""
    return Foreign(becomes=key)


def translated(translate: Callable[[Any], Mapping[str, Any]]) -> Foreign:
    """A key whose value `translate` turns into our keys and values."""
    return Foreign(translate=translate)


def ignored(reason: str, *, loud: bool = False) -> Foreign:
    """A key that is accepted without effect, for a reason that the user is told; even without -v if `loud`."""
    return Foreign(without_effect=reason, loud=loud)


def blocked(capability: str, instead: str = "Remove it.", says_nothing: tuple[Any, ...] = ()) -> Foreign:
    """A key that is refused as a capability that is not there, unless its value asks for nothing."""
    return Foreign(unsupported=capability, instead=instead, says_nothing=says_nothing)


def same(keys: str, meaning: Foreign) -> dict[str, Foreign]:
    """Several keys, written as one text, with one meaning."""
    return dict.fromkeys(keys.split(), meaning)
