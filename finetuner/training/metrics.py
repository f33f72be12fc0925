"""metrics.jsonl: one object per logged step or evaluation, floats in full."""

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch


class MetricsFile:
    """Appends rows; every row is on disk (as far as the operating system) when `write` returns."""

    def __init__(self, path: Path, *, resume_after: int | None = None) -> None:
        """Starts an empty file, or keeps the rows of steps up to `resume_after`, so that a resumed run goes on as if it
        had never stopped."""
        self.path = path
        kept = [] if resume_after is None else [r for r in read_metrics(path) if r.get("step", 0) <= resume_after]
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(path)

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Numbers that JSON has no word for (nan, inf) become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All whole rows; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS
