"""Counts of a source's rows, what they hold and what became of them: a line for each source at the start of a run."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetuner.data.documents import BLANK, CUT, DROPPED, DUPLICATE, NOTED, SPLIT, SPLIT_IN_PART, MadeDocuments
from finetuner.data.formats.base import Rendered
from finetuner.data.token_store import IGNORE_INDEX, Document

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
        """Count rows that were prepared together."""
        self.num_rows += len(made.documents)
        self.reasons.update(outcome.reason for outcome in made.outcomes)
        for text, documents in zip(made.texts, made.documents, strict=True):
            if isinstance(text, Rendered):
                if text.ignored:
                    self.ignored.update(text.ignored)
                if documents and text.roles:
                    self._use_turns(text, 1)
        self._use([documents for documents in made.documents if documents], 1)

    def take_duplicate_out(self, text: Rendered | Document | None, documents: Sequence[Document]) -> None:
        """Count a row that `add` has counted as one that is left out, since an equal row came before."""
        self.reasons[DUPLICATE] += 1
        if isinstance(text, Rendered):
            self._use_turns(text, -1)
        self._use([documents], -1)

    def _use_turns(self, text: Rendered, times: int) -> None:
        self.num_lost_thoughts += times * text.left_out_thoughts
        for role in text.roles:
            self.roles[role] += times

    def _use(self, rows: Sequence[Sequence[Document]], times: int) -> None:
        """Count the documents of rows, `times` each."""
        self.num_used += times * len(rows)
        labels = [labels for documents in rows for _, labels in documents]
        if labels:
            joined = np.concatenate(labels)  # the first token of a document has no position that predicts it
            num_first = sum(int(one[0]) != IGNORE_INDEX for one in labels)
            self.num_tokens += times * len(joined)
            self.num_trained += times * (int(np.count_nonzero(joined != IGNORE_INDEX)) - num_first)

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
