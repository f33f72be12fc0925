"""Mistakes in a recipe and notes on it, with their places, as text; and the words that a typo was meant to be."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from finetuner.redaction import hidden

KeyPath = tuple[str | int, ...]

MAX_SHOWN = 50


@dataclass(frozen=True)
class Origin:
    """The place where a key or value was written: in a file, or in an override on the command line."""

    source: str
    line: int = 0  # 1-based; 0 for an override
    column: int = 0  # 1-based
    text: str = ""  # the line

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else f"<{self.source}>"

    def excerpt(self, *, marked: bool) -> list[str]:
        """Return the line with its number, and with a caret below the column if `marked`."""
        if not self.text:
            return []
        margin = f"{self.line:>6} | " if self.line else "         "
        shown = hidden(self.text)[:160]
        lines = [margin + shown]
        if marked and self.line and self.column <= 160:
            lines.append(" " * (len(margin) - 2) + "| " + " " * (self.column - 1) + "^")
        return lines


@dataclass(frozen=True)
class Problem:
    """One mistake, with what to write instead. `also`: the other places that it is about."""

    message: str
    origin: Origin | None = None
    also: tuple[Origin, ...] = ()

    def render(self) -> str:
        """Return the message under its place, and the lines of all its places."""
        if self.origin is None:
            return self.message
        lines = [f"{self.origin}: {self.message}"]
        places = {str(place): place for place in (*self.also, self.origin)}  # a rule may name one place twice
        for place in sorted(places.values(), key=lambda o: (o.source, o.line)):
            lines += place.excerpt(marked=place == self.origin)
        return "\n".join(lines)


@dataclass(frozen=True)
class Note:
    """A remark on how some keys were read; the first of them stands at `origin`.

    `quiet`: shown by `finetuner check -v` alone.
    """

    keys: tuple[str, ...]
    message: str
    origin: Origin | None = None
    quiet: bool = False

    def __str__(self) -> str:
        place = "" if self.origin is None else f"line {self.origin.line}: " if self.origin.line else f"{self.origin}: "
        return f"{place}{', '.join(self.keys)} {self.message}" if self.keys else f"{place}{self.message}"


def grouped(notes: Iterable[Note]) -> tuple[Note, ...]:
    """Return one note for all keys of which the same is said, in the order of the file."""
    groups: dict[tuple[str, bool], list[Note]] = {}
    for note in notes:
        groups.setdefault((note.message, note.quiet), []).append(note)
    return tuple(replace(group[0], keys=tuple(key for note in group for key in note.keys)) for group in groups.values())


def render_problems(name: str, problems: Iterable[Problem]) -> str:
    """Return all mistakes as one message, in the order in which they stand in the file."""
    ordered = sorted(problems, key=lambda p: (p.origin.line, p.origin.column) if p.origin else (10**9, 0))
    count = "1 mistake" if len(ordered) == 1 else f"{len(ordered):,} mistakes"
    more = f"\n\nand {len(ordered) - MAX_SHOWN:,} more" if len(ordered) > MAX_SHOWN else ""
    return f"{name}: {count}\n\n" + "\n\n".join(problem.render() for problem in ordered[:MAX_SHOWN]) + more


def near_words(word: str, known: Iterable[str]) -> list[str]:
    """Return the nearest known words (at most 3) that `word` was probably meant to be, or none.

    Nearest is fewest slips; several words in a tie are all named, since each may have been meant. Words with more slips
    than a third of their letters are found by what they share (`batch_size` of `micro_batch_size`), if by anything.
    """
    words = list(known)
    plain = _plain(word)
    near = [(edit_distance(plain, _plain(other), limit=max(1, len(word) // 3)), other) for other in words]
    least = min((distance for distance, _ in near if distance is not None), default=None)
    if least is not None:
        ties = sorted(other for distance, other in near if distance == least)
        if len(ties) <= 3 or least <= 1:
            return ties
    close = difflib.get_close_matches(plain, words, n=3, cutoff=0.6)
    likeness = {other: difflib.SequenceMatcher(None, other, plain).ratio() for other in close}
    return sorted(other for other in close if likeness[other] == max(likeness.values()))


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def edit_distance(one: str, other: str, limit: int) -> int | None:
    """Count the slips between two words: a letter wrong, missing, too many, or two neighbors swapped.

    None if there are more than `limit`.

    The optimal string alignment distance (en.wikipedia.org/wiki/Damerau-Levenshtein_distance).
    """
    if abs(len(one) - len(other)) > limit:
        return None
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        earlier, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            slips = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                slips = min(slips, earlier[j - 2] + 1)
            row.append(slips)
        if min(row) > limit:
            return None
    return row[-1] if row[-1] <= limit else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?", " ... 'x' or 'y'?" in a tie, or "" if nothing is near."""
    return did_you_mean_one_of(near_words(word, known))


def did_you_mean_one_of(near: Iterable[str]) -> str:
    """Return did_you_mean's sentence for words that are known to be near."""
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
