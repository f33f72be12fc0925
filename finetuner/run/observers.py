"""Observers of a run: watchdog, bar, metrics file with the trackers, and texts by the model in training."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from finetuner.checkpoint.output_dir import METRICS
from finetuner.console import Screen
from finetuner.models.generation import sample_text
from finetuner.recipe import flat_values
from finetuner.redaction import without_secrets
from finetuner.run.layout import ReadyToTrain
from finetuner.run.session import Session
from finetuner.training.metrics import MetricsFile
from finetuner.training.observers import Observer
from finetuner.training.progress import TrainingProgress
from finetuner.training.records import EvaluationRecord, StepRecord
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats
from finetuner.training.trackers import Trackers
from finetuner.training.watchdog import Watchdog, stacks_when_stuck


class MetricsLog(Observer):
    """Writes rows to metrics.jsonl and to the trackers; for the main rank."""

    def __init__(self, path: Path, trackers: Trackers, *, resume_after: int | None) -> None:
        self.metrics = MetricsFile(path, resume_after=resume_after)
        self.trackers = trackers

    def logged(self, row: StepRecord) -> None:
        self._write(row.as_dict())

    def evaluated(self, row: EvaluationRecord) -> None:
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


@contextmanager
def open_observers(session: Session, ready: ReadyToTrain, done: int) -> Iterator[list[Observer]]:
    """Yield the observers of a run that has taken `done` steps, and close them at its end."""
    recipe, run, screen = session.recipe, ready.run, session.screen
    schedule = run.schedule
    several = session.plan.parallel.world_size > 1
    stuck = stacks_when_stuck(recipe.sharding.ddp_timeout) if several else nullcontext(lambda: None)
    rows_of_rank = -(-len(run.held_out.rows) // session.plan.data_parallel)
    bar = TrainingProgress(screen, schedule.total_steps, done, eval_rows=rows_of_rank, rows_seen=schedule.rows_seen)
    with bar as progress, stuck as alive:
        observers: list[Observer] = [Watchdog(alive)]
        trackers = None
        well = False
        try:
            if session.world.is_main:
                shown = without_secrets(flat_values(recipe))
                trackers = Trackers.open(recipe.tracking, session.output_dir, shown, done=done, say=screen.line)
                observers.append(MetricsLog(session.output_dir / METRICS, trackers, resume_after=done or None))
            observers.append(progress)
            every = recipe.evaluation.generate_samples
            if session.world.is_main and every is not None:
                trained = ready.trained
                prompt = recipe.evaluation.generate_prompt
                observers.append(TextSamples(trained.loss.model, trained.tokenizer, prompt, every, screen))
            yield observers
            well = True
        finally:
            if trackers is not None:
                trackers.close(well=well)
