"""The progress bar of a training run, and a plain line for each logged step where there is no terminal."""

from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finetuner.console import Screen, TimeLeftColumn, duration


class TrainingProgress:
    """Loss, learning rate, tokens per second and time left, for every step or every logged step."""

    def __init__(
        self, screen: Screen, total_steps: int, done: int, *, eval_rows: int, rows_seen: Callable[[int], int]
    ) -> None:
        """`done` steps are behind; an evaluation takes `eval_rows` rows of this rank, and `rows_seen` of all ranks are
        learned in so many steps."""
        self.screen, self.total_steps, self.eval_rows = screen, total_steps, eval_rows
        self.rows_seen, self.rows_before = rows_seen, rows_seen(done)
        self.seconds, self.steps, self.evaluated_rows = 0.0, 0, 0
        self.use = ""  # of the devices, as last logged
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeLeftColumn(),
            console=screen.console,
            disable=not (screen.speaks and screen.terminal),
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=done, facts="", left=None)

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def left(self, step: int) -> float:
        """Seconds, at the pace of the rows so far: steps may grow."""
        rows = self.rows_seen(step)
        return self.seconds / max(1, rows - self.rows_before) * (self.rows_seen(self.total_steps) - rows)

    def stepped(self, step: int, loss: float, lr: float, input_tokens: int, seconds: float) -> None:
        self.steps += 1
        # The first step also compiles kernels and fills caches: it would spoil the estimate.
        self.seconds = seconds * 2 if self.steps == 2 else self.seconds + seconds
        facts = f"loss {loss:.4f}  lr {lr:.2e}  {input_tokens / seconds:,.0f} tok/s{self.use}"
        self.bar.update(self.task, completed=step, facts=facts, left=self.left(step))

    def logged(self, row: dict) -> None:
        self.use = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
        if not self.screen.terminal:
            self.screen.line(
                f"step {row['step']}/{self.total_steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  "
                f"lr {row['learning_rate']:.2e}  grad norm {row['grad_norm']:.3f}  "
                f"{row['tokens_per_second']:,.0f} tok/s{self.use}  {duration(self.left(row['step']))} left"
            )

    def evaluating(self, rows: int) -> None:
        """`rows` more held-out rows are done."""
        self.evaluated_rows += rows
        self.bar.update(self.task, facts=f"evaluating: {self.evaluated_rows:,} of {self.eval_rows:,} rows")

    def evaluated(self, row: dict) -> None:
        self.evaluated_rows = 0
        line = (
            f"step {row['step']}/{self.total_steps}  held-out loss {row['eval_loss']:.4f}  "
            f"perplexity {row['eval_perplexity']:.3f}"
        )
        if "eval_bits_per_byte" in row:
            line += f"  bits per byte {row['eval_bits_per_byte']:.4f}"
        of_sources = [
            f"{name.removeprefix('eval_loss/')} {loss:.4f}"
            for name, loss in row.items()
            if name.startswith("eval_loss/")
        ]
        self.screen.line(line + (f"  ({', '.join(of_sources)})" if of_sources else ""))
