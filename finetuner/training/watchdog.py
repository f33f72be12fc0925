"""Print the stacks of a rank that makes no progress, before the launcher kills it."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetuner.training.observers import Observer
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats

# Share of the time after which the other ranks give up waiting: then the launcher ends a stuck rank too.
SHARE_OF_TIMEOUT = 0.8


@contextmanager
def stacks_when_stuck(timeout_seconds: float) -> Iterator[Callable[[], None]]:
    """Yield a function to call at every sign of progress; without a call for most of `timeout_seconds`, write the stack
    of every thread to stderr, once.

    The interpreter's own thread writes it, so that a library that hangs is seen as well.
    """
    stderr = sys.__stderr__
    if stderr is None:  # a process without one
        yield lambda: None
        return

    def progress() -> None:
        faulthandler.dump_traceback_later(SHARE_OF_TIMEOUT * timeout_seconds, file=stderr)

    progress()
    try:
        yield progress
    finally:
        faulthandler.cancel_dump_traceback_later()


class Watchdog(Observer):
    """Calls `progress` at every sign of life."""

    def __init__(self, progress: Callable[[], None]) -> None:
        self.progress = progress

    def step_done(self, state: TrainState, stats: StepStats, seconds: float) -> None:
        self.progress()

    def evaluating(self, num_rows: int) -> None:
        self.progress()

    def saving(self) -> None:
        self.progress()
