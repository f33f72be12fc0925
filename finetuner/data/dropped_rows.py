"""dropped.jsonl of a streaming run: the rows that are not trained on as they are, listed as a preparation lists its
own, and counted since the run's first start."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from finetuner.data.documents import DROPPED, NOTED, Outcome
from finetuner.storage.json_lines import append_rows, read_rows, replace_rows

LISTED = "dropped.jsonl"
MAX_LISTED = 10_000  # rows of each reason
READ = "read"


class DroppedRowsFile:
    """The file: the first rows of each reason, each with the number of the block that it was read for."""

    def __init__(self, path: Path | None, block: int, max_listed: int = MAX_LISTED) -> None:
        """Keep the rows of blocks before `block` in a file that exists, so that a resumed run lists what an unbroken
        one would. A `path` of None writes nothing."""
        self.path, self.max_listed = path, max_listed
        rows = [] if path is None else [row for row in read_rows(path) if row["block"] < block]
        self.num_listed = Counter(row["reason"] for row in rows)
        if path is not None:
            replace_rows(path, rows)

    def add(self, outcomes: Iterable[Outcome], block: int) -> None:
        """List rows that were read for `block`, unless there are `max_listed` of their reason."""
        if self.path is None:
            return
        rows = []
        for outcome in outcomes:
            if outcome.reason not in NOTED and self.num_listed[outcome.reason] < self.max_listed:
                self.num_listed[outcome.reason] += 1
                rows.append(outcome._asdict() | {"block": block})
        if rows:
            append_rows(self.path, rows)


def drop_notes(counts: Mapping[str, int]) -> list[str]:
    """Return each reason in words with the number of rows it took."""
    return [f"{count:,} rows {reason}" for reason, count in sorted(counts.items()) if reason != READ]


def dropped_share(counts: Mapping[str, int]) -> float:
    """Rows that gave nothing to train on, as a share of the rows read."""
    return sum(counts.get(reason, 0) for reason in DROPPED) / max(1, counts.get(READ, 0))
