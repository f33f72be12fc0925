"""What a run does beside training: its metrics file, its trackers, and texts by the model in training."""

from pathlib import Path
from typing import Any

from finetuner.console import Screen
from finetuner.models.generation import sample_text
from finetuner.training.metrics import MetricsFile
from finetuner.training.observers import Observer
from finetuner.training.rows import EvaluationRow, StepRow
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats
from finetuner.training.trackers import Trackers


class MetricsLog(Observer):
    """Writes rows to metrics.jsonl and to the trackers; for the main rank."""

    def __init__(self, path: Path, trackers: Trackers, *, resume_after: int | None) -> None:
        self.metrics = MetricsFile(path, resume_after=resume_after)
        self.trackers = trackers

    def logged(self, row: StepRow) -> None:
        self._write(row.as_dict())

    def evaluated(self, row: EvaluationRow) -> None:
        self._write(row.as_dict())

    def _write(self, row: dict[str, float]) -> None:
        self.metrics.write(row)
        self.trackers.log(row)


class TextSamples(Observer):
    """Shows a text by the model every `every` steps; for the main rank, of a model that it holds in full."""

    def __init__(self, model: Any, tokenizer: Any, prompt: str, every: int, screen: Screen) -> None:
        self.model, self.tokenizer, self.prompt, self.every, self.screen = model, tokenizer, prompt, every, screen

    def step_done(self, state: TrainState, stats: StepStats, seconds: float) -> None:
        if state.step % self.every == 0:
            text = sample_text(self.model, self.tokenizer, self.prompt, state.step)
            self.screen.line(f"step {state.step} writes: {text}")
