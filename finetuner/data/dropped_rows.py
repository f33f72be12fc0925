"""What becomes of the rows of a stream that are not learned as they stand: counted since the run's first start, and
listed in a file as a preparation lists its own."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetuner.data.documents import DROPPED, Outcome

LISTED = "dropped.jsonl"
MOST = 10_000  # rows of each reason
READ = "read"


class Listing:
    """The file: the first rows of each reason, each with the block that it was read for."""

    def __init__(self, path: Path | None, block: int, most: int = MOST) -> None:
        """Of a file that is there, the rows of blocks before `block` stay, so that a run that goes on lists what one
        without a break would. None: nothing is written."""
        self.path, self.most = path, most
        kept = _rows_before(path, block) if path is not None else []
        self.listed = Counter(row["reason"] for row in kept)
        if path is not None:
            aside = path.with_name(f"{path.name}.tmp")
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            aside.replace(path)

    def add(self, outcomes: Iterable[Outcome], block: int) -> None:
        if self.path is None:
            return
        lines = []
        for outcome in outcomes:
            if self.listed[outcome.reason] < self.most:
                self.listed[outcome.reason] += 1
                lines.append(json.dumps(outcome._asdict() | {"block": block}) + "\n")
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def _rows_before(path: Path, block: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            break
        if row["block"] < block:
            rows.append(row)
    return rows


def notes_of(counts: Mapping[str, int]) -> list[str]:
    """Each reason and how many rows it took, in words."""
    return [f"{count:,} rows {reason}" for reason, count in sorted(counts.items()) if reason != READ]


def dropped_share(counts: Mapping[str, int]) -> float:
    return sum(counts.get(reason, 0) for reason in DROPPED) / max(1, counts.get(READ, 0))
