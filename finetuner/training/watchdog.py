"""A rank that makes no progress says where it is stuck, while it can."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of the time after which the other ranks give up waiting: its launcher ends a stuck rank as soon as they have.
PART_OF_TIMEOUT = 0.8


@contextmanager
def stacks_when_stuck(timeout_seconds: float) -> Iterator[Callable[[], None]]:
    """Within the block, the stack of every thread goes to stderr once when what it yields was not called for most of
    `timeout_seconds`. From another thread of the interpreter's own, so that a library that hangs is seen as well."""
    stderr = sys.__stderr__
    if stderr is None:  # a process without one
        yield lambda: None
        return

    def progress() -> None:
        faulthandler.dump_traceback_later(PART_OF_TIMEOUT * timeout_seconds, file=stderr)

    progress()
    try:
        yield progress
    finally:
        faulthandler.cancel_dump_traceback_later()
