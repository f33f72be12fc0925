"""The training and held-out documents of a recipe, and what happened to the rows that are not among them."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetuner.data.documents import BY_WEIGHT, DROPPED
from finetuner.data.packing import Packs
from finetuner.data.row_counts import RowCounts, at_a_glance
from finetuner.data.token_store import TokenRows, TokenStore
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection


class SourceShare(NamedTuple):
    """Numbers of a source's documents that are trained on, and held out. Stores hold them source by source."""

    name: str
    train: int
    held_out: int


class SourceRange(NamedTuple):
    """Rows [start, stop) of the held-out rows: those of one source."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class PreparedData:
    """Training and held-out documents of a recipe, and their packs if it asks for packing.

    `counts`: rows that were dropped, cut or split, by reason. `num_rows`: rows that were read. `shares`: source by
    source, in the order of the stores, as are `row_counts`. `dropped_file`: lists each row of `counts`; None if
    nothing was written.
    """

    train: TokenStore
    held_out: TokenStore
    counts: Counter[str]
    num_rows: int
    shares: tuple[SourceShare, ...]
    row_counts: tuple[RowCounts, ...] = ()
    train_packs: Packs | None = None
    held_out_packs: Packs | None = None
    dropped_file: Path | None = None

    @property
    def train_rows(self) -> TokenRows:
        """The rows of training batches: packs, if there are any, else documents."""
        return self.train_packs or self.train

    @property
    def held_out_rows(self) -> TokenRows:
        """The rows of evaluation batches: packs, if there are any, else documents."""
        return self.held_out_packs or self.held_out

    @property
    def held_out_ranges(self) -> tuple[SourceRange, ...]:
        """The held-out rows of each source that has any."""
        sizes = [share.held_out for share in self.shares]
        if self.held_out_packs is not None:
            sizes = list(self.held_out_packs.packs_per_group)
        stops = np.cumsum(sizes).tolist()
        ranges = [
            SourceRange(s.name, stop - size, stop) for s, size, stop in zip(self.shares, sizes, stops, strict=True)
        ]
        return tuple(one for one in ranges if one.stop > one.start)

    @property
    def rows_at_a_glance(self) -> list[str]:
        """A line for each source on its rows and what became of them, under a heading; none without sources."""
        if not self.row_counts:
            return []
        lines = at_a_glance([share.name for share in self.shares], self.row_counts)
        by_weight = self.counts[BY_WEIGHT]
        return [*lines, f"  {by_weight:,} documents {BY_WEIGHT}"] if by_weight else lines

    @property
    def notes(self) -> list[str]:
        """A note per reason on the rows that were dropped, cut or split."""
        return [f"{count:,} rows {reason}" for reason, count in sorted(self.counts.items())]


def pack_documents(prepared: PreparedData, sequence_len: int, *, train: bool, held_out: bool) -> PreparedData:
    """Return the data with packs of the training documents, the held-out ones, or both.

    A pack of held-out documents has those of one source alone, so that each source has a loss of its own.
    """
    group_sizes = tuple(share.held_out for share in prepared.shares)
    return replace(
        prepared,
        train_packs=Packs.of(prepared.train, sequence_len) if train and len(prepared.train) else None,
        held_out_packs=(
            Packs.of(prepared.held_out, sequence_len, group_sizes) if held_out and len(prepared.held_out) else None
        ),
    )


def require_few_dropped(prepared: PreparedData, section: DataSection) -> None:
    """Raise DataError, with the number of rows by reason, if more are dropped than max_dropped_fraction allows."""
    counts = {reason: prepared.counts[reason] for reason in DROPPED if prepared.counts[reason]}
    share = sum(counts.values()) / max(1, prepared.num_rows)
    if share <= section.max_dropped_fraction:
        return
    table = "\n".join(f"  {count:>9,} rows {reason}" for reason, count in counts.items())
    listed = f"Each is listed in {prepared.dropped_file}\n" if prepared.dropped_file is not None else ""
    raise DataError(
        f"{share:.1%} of the {prepared.num_rows:,} rows would be dropped, and max_dropped_fraction allows "
        f"{section.max_dropped_fraction:.0%}:\n{table}\n{listed}"
        f"Raise sequence_len (it is {section.sequence_len}), write `excess_length_strategy: truncate` or `split`, or "
        f"allow it: `max_dropped_fraction: {min(1.0, np.ceil(share * 20) / 20):g}`."
    )


def held_out_only(section: DataSection) -> DataSection:
    """Return the section without training rows: all that is prepared where those are streamed."""
    return section.model_copy(update={"datasets": ()})
