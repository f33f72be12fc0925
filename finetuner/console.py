"""Print to the terminal: lines, tables and progress bars, on the main rank alone."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from finetuner.redaction import without_secrets
from finetuner.world import stream_is_terminal


def duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:05 or 1:02:33."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Screen:
    """Prints on the main rank and is silent on the others."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.terminal = stream_is_terminal(sys.stdout)
        # A log file has no width; rich would cut its lines at 80 characters.
        self.console = Console(highlight=False, soft_wrap=not self.terminal, width=None if self.terminal else 160)

    def line(self, text: str = "") -> None:
        if self.enabled:
            self.console.print(without_secrets(text), markup=False)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print a short two-column table."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")  # a path is whole or useless
        for name, value in rows:
            table.add_row(Text(name, style="bold"), Text(without_secrets(value)))
        if self.enabled:
            self.console.print(table)

    @contextmanager
    def work(self, what: str, unit: str) -> Iterator["WorkProgress"]:
        """Yield the progress of one long piece of work, whose size may become known later."""
        with WorkProgress(self, what, unit) as work:
            yield work


class TimeLeftColumn(ProgressColumn):
    """Render the time left, from the field `left` of a task (seconds, or None while unknown)."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text(f"{duration(left)} left" if left is not None else "", style="cyan")


class WorkProgress:
    """Progress of one piece of work: a bar that vanishes when done (terminal), or a line every ten seconds."""

    def __init__(self, screen: Screen, what: str, unit: str) -> None:
        self.screen, self.what, self.unit = screen, what, unit
        self.started = self.spoken = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeLeftColumn(),
            console=screen.console,
            transient=True,
            disable=not (screen.enabled and screen.terminal),
        )
        self.task = self.bar.add_task(what, total=None, unit=unit, left=None)

    def __enter__(self) -> "WorkProgress":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def at(self, done: int, total: int) -> None:
        """Show that so many of the units are done."""
        now = time.monotonic()
        left = (now - self.started) / done * (total - done) if done else None
        self.bar.update(self.task, completed=done, total=total, left=left, unit=self.unit)
        if not self.screen.terminal and now - self.spoken > 10 and left is not None:
            self.spoken = now
            self.screen.line(f"{self.what}: {done:,} of {total:,} {self.unit}, {duration(left)} left")

    def at_bytes(self, done: int, total: int) -> None:
        """Show that so many bytes are done, in MB or GB."""
        scale, self.unit = (10**9, "GB") if total >= 10**10 else (10**6, "MB")
        self.at(done // scale, total // scale)


def quiet_imports() -> None:
    """Let libraries say errors alone while they are imported. Called before any of them is."""
    # transformers imports torchao wherever it is installed, which lists the kernels that this machine cannot load, and
    # registers what torch no longer needs to be told.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries(screen: Screen) -> None:
    """Let libraries say errors alone: our own lines say what a user needs."""
    import datasets
    import transformers

    # Their deprecations among each other are not the user's to fix.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|datasets|peft|torch|transformers)\b")
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    # It says at import that a package of faster CPU kernels is not there; PEFT imports it wherever it is installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed warns at import that a CPU is one. It sets its logger's level again at import; filters stay.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    if not (screen.enabled and screen.terminal):
        transformers.logging.disable_progress_bar()
