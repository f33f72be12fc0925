"""Observers of the training loop; each decides for itself when to act."""

from finetuner.training.records import EvaluationRecord, StepRecord
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats


class Observer:
    """A component that is told what happens in a run; by default it does nothing. Called on every rank."""

    def step_done(self, state: TrainState, stats: StepStats, seconds: float) -> None:
        """One step was taken; `seconds`: its duration."""

    def logged(self, row: StepRecord) -> None:
        """A step is one of those that are logged."""

    def evaluating(self, num_rows: int) -> None:
        """`num_rows` more held-out rows were evaluated on this rank."""

    def evaluated(self, row: EvaluationRecord) -> None:
        """An evaluation is complete."""

    def saving(self) -> None:
        """A checkpoint is about to be written, or has just been written."""
