"""The progress bar of a training run, and a plain line for each logged step where there is no terminal."""

from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finetuner.console import Screen, TimeLeftColumn, duration
from finetuner.training.observers import Observer
from finetuner.training.records import EvaluationRecord, StepRecord
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats


class TrainingProgress(Observer):
    """Shows loss, learning rate, tokens per second and time left: of every step on a terminal, else of logged steps."""

    def __init__(
        self, screen: Screen, total_steps: int, done: int, *, eval_rows: int, rows_seen: Callable[[int], int]
    ) -> None:
        """`done`: steps taken before; `eval_rows`: rows of an evaluation on this rank; `rows_seen`: number of steps ->
        rows that all ranks have trained on."""
        self.screen, self.total_steps, self.eval_rows = screen, total_steps, eval_rows
        self.rows_seen, self.rows_before = rows_seen, rows_seen(done)
        self.seconds, self.steps, self.evaluated_rows = 0.0, 0, 0
        self.utilization = ""  # of the devices, as last logged
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeLeftColumn(),
            console=screen.console,
            disable=not (screen.enabled and screen.terminal),
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=done, facts="", left=None)

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def seconds_left(self, step: int) -> float:
        """Return the seconds left, at the pace of the rows so far: steps may grow."""
        rows = self.rows_seen(step)
        return self.seconds / max(1, rows - self.rows_before) * (self.rows_seen(self.total_steps) - rows)

    def step_done(self, state: TrainState, stats: StepStats, seconds: float) -> None:
        self.steps += 1
        # The first step also compiles kernels and fills caches: it would spoil the estimate.
        self.seconds = seconds * 2 if self.steps == 2 else self.seconds + seconds
        speed = f"{stats.num_input_tokens / seconds:,.0f} tok/s{self.utilization}"
        facts = f"loss {stats.loss:.4f}  lr {stats.learning_rate:.2e}  {speed}"
        self.bar.update(self.task, completed=state.step, facts=facts, left=self.seconds_left(state.step))
        if not stats.updated:
            self.screen.line(
                f"step {state.step}: loss {stats.loss}, gradient norm {stats.grad_norm}: the update is skipped"
            )

    def logged(self, row: StepRecord) -> None:
        self.utilization = "" if row.mfu is None else f"  MFU {row.mfu:.1%}"
        if not self.screen.terminal:
            self.screen.line(
                f"step {row.step}/{self.total_steps}  epoch {row.epoch:.2f}  loss {row.loss:.4f}  "
                f"lr {row.learning_rate:.2e}  grad norm {row.grad_norm:.3f}  "
                f"{row.tokens_per_second:,.0f} tok/s{self.utilization}  {duration(self.seconds_left(row.step))} left"
            )

    def evaluating(self, num_rows: int) -> None:
        self.evaluated_rows += num_rows
        self.bar.update(self.task, facts=f"evaluating: {self.evaluated_rows:,} of {self.eval_rows:,} rows")

    def evaluated(self, row: EvaluationRecord) -> None:
        self.evaluated_rows = 0
        line = f"step {row.step}/{self.total_steps}  held-out loss {row.loss:.4f}"
        if row.perplexity is not None:
            line += f"  perplexity {row.perplexity:.3f}"
        if row.bits_per_byte is not None:
            line += f"  bits per byte {row.bits_per_byte:.4f}"
        sources = ", ".join(f"{name} {loss:.4f}" for name, loss in row.by_source.items())
        self.screen.line(line + (f"  ({sources})" if sources else ""))
