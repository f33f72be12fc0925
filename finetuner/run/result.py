"""The result of a training run, as a value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.checkpoint.output_dir import METRICS
from finetuner.training.metrics import read_metrics
from finetuner.training.state import TrainState


@dataclass(frozen=True)
class TrainResult:
    """The end of a training run.

    `folder`: output_dir, with the adapter or the model; `steps`: optimizer updates in all, earlier starts included;
    `metrics`, `evaluation`: the last rows of metrics.jsonl, by its names (empty if there is none);
    `best_step`, `best_eval_loss`: the evaluation with the lowest held-out loss.
    """

    folder: Path
    steps: int
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    best_step: int | None = None
    best_eval_loss: float | None = None
    stopped_early: bool = False

    @classmethod
    def read(cls, folder: Path, state: TrainState) -> "TrainResult":
        """Return the result of the run in `folder` that ended in `state`."""
        rows = read_metrics(folder / METRICS)
        return cls(
            folder=folder,
            steps=state.step,
            metrics=next((row for row in reversed(rows) if "loss" in row), {}),
            evaluation=next((row for row in reversed(rows) if "eval_loss" in row), {}),
            best_step=state.best_step,
            best_eval_loss=state.best_eval_loss,
            stopped_early=state.stopped_early,
        )
