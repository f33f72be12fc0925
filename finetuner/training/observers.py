"""Observers of the loop. It decides nothing for them: whether it is time is the business of each."""

from finetuner.training.rows import EvaluationRow, StepRow
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats


class Observer:
    """A component that is told what happens in a run; by default it does nothing. Called on every rank."""

    def step_done(self, state: TrainState, stats: StepStats, seconds: float) -> None:
        """A step was taken in so many seconds."""

    def logged(self, row: StepRow) -> None:
        """A step is one of those that are logged."""

    def evaluating(self, num_rows: int) -> None:
        """So many more held-out rows were evaluated on this rank."""

    def evaluated(self, row: EvaluationRow) -> None:
        """An evaluation is complete."""

    def saving(self) -> None:
        """A checkpoint is begun, or has just been written."""
