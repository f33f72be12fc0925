"""metrics.jsonl: one object per logged step or evaluation, floats in full."""

import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetuner.storage.json_lines import append_rows, read_rows, replace_rows


class MetricsFile:
    """The file of a run, to which a row at a time is added. A row outlives a kill as soon as `write` returns."""

    def __init__(self, path: Path, *, resume_after: int | None = None) -> None:
        """Start an empty file, or keep the rows of steps up to `resume_after`, so that a resumed run goes on as if it
        had never stopped."""
        self.path = path
        rows = [] if resume_after is None else read_metrics(path)
        replace_rows(path, [row for row in rows if row.get("step", 0) <= (resume_after or 0)])

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Add a row. Numbers that JSON has no word for (nan, inf) become null."""
        append_rows(
            self.path,
            [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}],
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, but for a last one that a kill cut short; none if there is no file."""
    return read_rows(path)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes that this rank has had at once: allocated on its GPU, or resident where it trains on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS
