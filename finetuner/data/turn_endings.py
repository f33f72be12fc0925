"""The tokens that end a turn, and the rules for which of them are trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from finetuner.recipe.sections.datasets import Ends

_TAG = r"<[^<>\s]{1,40}>"  # a word in angle brackets is not cut, be it a token or not


class Ending(NamedTuple):
    """`ending` are the tokens that end a turn, which stand `at` so many characters into a text; "" if none do."""

    at: int
    ending: str


@dataclass(frozen=True)
class TurnEndings:
    """The tokens that end a turn, and which turns have their ending trained on.

    `tokens`: those that may end a turn. `named`: those of them that the recipe names (eot_tokens), which end a turn
    also where the next turn begins with them. `added`: all tokens of the vocabulary that are not merged from text.
    `of_text` rules where an ending is the tokenizer's end-of-text (`eos`), `of_turn` where it is another.
    """

    tokens: tuple[str, ...]
    named: tuple[str, ...]
    added: tuple[str, ...]
    eos: str | None
    of_text: Ends = "turn"
    of_turn: Ends = "turn"

    @cached_property
    def _whole(self) -> re.Pattern[str]:
        return re.compile("|".join([*_escaped(self.added), _TAG]))

    @cached_property
    def _runs(self) -> re.Pattern[str]:
        return re.compile(f"(?:{'|'.join(_escaped(self.tokens))})+") if self.tokens else re.compile(r"(?!)")

    @cached_property
    def _single(self) -> re.Pattern[str]:
        return re.compile("|".join(_escaped(self.tokens))) if self.tokens else re.compile(r"(?!)")

    def first(self, text: str) -> Ending:
        """Return the one token with which a text begins, with white space before it."""
        return self._at_beginning(text, self._single)

    def leading(self, text: str) -> Ending:
        """Return the tokens with which a text begins, with white space before them."""
        return self._at_beginning(text, self._runs)

    def last(self, text: str, *, one: bool) -> Ending:
        """Return the last tokens of a text, without white space before them. `one`: the very last token alone."""
        found = list((self._single if one else self._runs).finditer(text))
        return Ending(found[-1].start(), found[-1].group()) if found else Ending(len(text), "")

    def named_at_beginning(self, text: str) -> str:
        """Return the token of the recipe's eot_tokens with which a text begins, with white space before it; or ""."""
        num_blanks = len(text) - len(text.lstrip())
        token = max((token for token in self.named if text.startswith(token, num_blanks)), key=len, default="")
        return text[:num_blanks] + token if token else ""

    def added_at_beginning(self, text: str) -> str:
        """Return the token of the vocabulary with which a text begins, not counting white space; "" if none does."""
        return max((token for token in self.added if text.lstrip().startswith(token)), key=len, default="")

    def added_at_end(self, text: str) -> str:
        """Return the token of the vocabulary with which a text ends, not counting white space; "" if none does."""
        return max((token for token in self.added if token and text.rstrip().endswith(token)), key=len, default="")

    def num_shared(self, one: str, other: str) -> int:
        """Length of the longest common beginning of two texts, in characters, which ends within no token of either."""
        size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        if size in (len(one), len(other)):
            return size
        return min(self._outside_tokens(one, size), self._outside_tokens(other, size))

    def cuts_token(self, text: str, at: int) -> bool:
        """Return whether a text that is cut behind so many characters is cut within a token."""
        return self._outside_tokens(text, at) < at

    def _outside_tokens(self, text: str, at: int) -> int:
        for found in self._whole.finditer(text):
            if found.start() < at < found.end():
                return found.start()
            if found.start() >= at:
                break
        return at

    def _at_beginning(self, text: str, pattern: re.Pattern[str]) -> Ending:
        num_blanks = len(text) - len(text.lstrip())
        found = pattern.match(text, num_blanks)
        return Ending(0, text[: found.end()]) if found else Ending(0, "")

    def policy(self, ending: str) -> Ends:
        """Return the rule for turns that end with this text."""
        return self.of_text if self.eos is not None and ending.endswith(self.eos) else self.of_turn

    def is_required(self, ending: str, *, is_trained: bool, is_last: bool) -> bool:
        """Return whether a turn must have its ending trained on; `is_last`: no later turn is trained on."""
        policy = self.policy(ending)
        return is_trained and (policy in ("turn", "all") or (policy == "last" and is_last))


def _escaped(tokens: Sequence[str]) -> list[str]:
    return [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token]
