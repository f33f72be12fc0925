"""What is wrong with a recipe, where it stands, and how that is shown."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]

MAX_SHOWN = 50


@dataclass(frozen=True)
class Origin:
    """Where a key or value was written: a place in a file, or an override on the command line."""

    source: str
    line: int = 0  # 1-based; 0 for an override
    column: int = 0  # 1-based
    text: str = ""  # the whole line

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else f"<{self.source}>"

    def excerpt(self, *, marked: bool) -> list[str]:
        """The line itself, with its number; with a caret below the column if `marked`."""
        if not self.text:
            return []
        margin = f"{self.line:>6} | " if self.line else "         "
        lines = [margin + self.text[:160]]
        if marked and self.line and self.column <= 160:
            lines.append(" " * (len(margin) - 2) + "| " + " " * (self.column - 1) + "^")
        return lines


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong and what to write instead. `also`: the other places that it is about."""

    message: str
    origin: Origin | None = None
    also: tuple[Origin, ...] = ()

    def render(self) -> str:
        if self.origin is None:
            return self.message
        lines = [f"{self.origin}: {self.message}"]
        places = {str(place): place for place in (*self.also, self.origin)}  # a rule may name one place twice
        for place in sorted(places.values(), key=lambda o: (o.source, o.line)):
            lines += place.excerpt(marked=place == self.origin)
        return "\n".join(lines)


def render_problems(name: str, problems: Iterable[Problem]) -> str:
    """All mistakes in one message, in the order in which they stand in the file."""
    ordered = sorted(problems, key=lambda p: (p.origin.line, p.origin.column) if p.origin else (10**9, 0))
    count = "1 mistake" if len(ordered) == 1 else f"{len(ordered):,} mistakes"
    more = f"\n\nand {len(ordered) - MAX_SHOWN:,} more" if len(ordered) > MAX_SHOWN else ""
    return f"{name}: {count}\n\n" + "\n\n".join(problem.render() for problem in ordered[:MAX_SHOWN]) + more


def near_words(word: str, known: Iterable[str]) -> list[str]:
    """What `word` was probably meant to be: the nearest known word, several in a tie, or none."""

    def likeness(other: str) -> tuple[bool, float]:
        # Two letters in the wrong order are the likelier slip than a wrong letter: fb16 is bf16, not fp16.
        return sorted(other) == sorted(word), difflib.SequenceMatcher(None, other, word).ratio()

    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return sorted(other for other in close if likeness(other) == max(map(likeness, close)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", " ... 'x' or 'y'?" in a tie, or "" if nothing is near."""
    near = near_words(word, known)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
