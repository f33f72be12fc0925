"""Counts of a source's rows, what they hold and what became of them: a line for each source at the start of a run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetuner.data.documents import BLANK, CUT, DROPPED, DUPLICATE, NOTED, SPLIT, SPLIT_IN_PART, MadeDocuments
from finetuner.data.formats.base import Rendered
from finetuner.data.token_store import Document
from finetuner.data.token_store_writer import TokenCounts

_CHANGED = (CUT, SPLIT, SPLIT_IN_PART, *NOTED)  # reasons of rows that are trained on, not as they are
_LOST = (*DROPPED, BLANK, DUPLICATE)
_MOST_NAMES = 8  # of ignored columns and keys in one line


@dataclass
class RowCounts:
    """Rows of one source, counted while they are prepared.

    num_rows: rows read. num_used: rows that gave documents, trained on or held out. reasons: rows by what was done to
    them. num_tokens, num_trained: tokens of those documents, and those that a loss counts. roles: messages of the used
    rows by role. ignored: rows by inert column or key that they have. num_lost_thoughts: thoughts that the template
    does not write.
    """

    num_rows: int = 0
    num_used: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_trained: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    num_lost_thoughts: int = 0

    def add(self, made: MadeDocuments) -> None:
        """Count rows that were prepared together, but for their tokens."""
        self.num_rows += len(made.documents)
        self.reasons.update(outcome.reason for outcome in made.outcomes)
        for text, documents in zip(made.texts, made.documents, strict=True):
            if documents:
                self.num_used += 1
            if isinstance(text, Rendered):
                if text.ignored:
                    self.ignored.update(text.ignored)
                if documents and text.roles:
                    self._use_turns(text, 1)

    def take_duplicate_out(self, text: Rendered | Document | None) -> None:
        """Count a row that `add` has counted as one that is left out, since an equal row came before."""
        self.reasons[DUPLICATE] += 1
        self.num_used -= 1
        if isinstance(text, Rendered):
            self._use_turns(text, -1)

    def add_tokens(self, counts: TokenCounts) -> None:
        """Count the tokens of documents."""
        self.num_tokens += counts.tokens
        self.num_trained += counts.trained

    def _use_turns(self, text: Rendered, times: int) -> None:
        self.num_lost_thoughts += times * text.left_out_thoughts
        for role in text.roles:
            self.roles[role] += times

    @property
    def num_unaccounted(self) -> int:
        """Rows that are neither used nor dropped for a reason: 0, or a row has vanished."""
        return self.num_rows - self.num_used - sum(self.reasons[reason] for reason in _LOST)

    def line(self) -> str:
        """The counts in one line."""
        dropped = {reason: self.reasons[reason] for reason in _LOST if self.reasons[reason]}
        parts = [f"{self.num_rows:,} rows read, {self.num_used:,} used, {sum(dropped.values()):,} dropped"]
        if dropped:
            parts[0] += f" ({', '.join(f'{count:,} {reason}' for reason, count in dropped.items())})"
        parts += [f"{self.reasons[reason]:,} {reason}" for reason in _CHANGED if self.reasons[reason]]
        parts.append(f"{self.num_trained:,} of {self.num_tokens:,} tokens trained on")
        if self.roles:
            parts.append("turns: " + ", ".join(f"{role} {count:,}" for role, count in self.roles.most_common()))
        if self.num_lost_thoughts:
            parts.append(f"{self.num_lost_thoughts:,} thoughts that the chat template leaves out")
        parts.append(f"ignored: {_listed(self.ignored)}")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return the counts as JSON, for `from_json`."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "RowCounts":
        """Return the counts that `as_json` gave."""
        counters = {name: Counter(facts[name]) for name in ("reasons", "roles", "ignored")}
        return cls(**{**facts, **counters})


def _listed(names: Counter[str]) -> str:
    """Return the names, the most frequent first; "nothing" if there are none."""
    shown = [name for name, _ in names.most_common(_MOST_NAMES)]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more if shown else "nothing"


def at_a_glance(names: Iterable[str], counts: Iterable[RowCounts], head: str = "rows at a glance") -> list[str]:
    """Return `head` and a line for each source, to be printed one under the other."""
    return [f"{head}:", *(f"  {name}: {one.line()}" for name, one in zip(names, counts, strict=True))]
