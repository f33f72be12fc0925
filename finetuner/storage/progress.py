"""The type of a progress callback, defined once for every room."""

from collections.abc import Callable

ProgressReport = Callable[[int, int], None]  # units done, units in all: rows, bytes, tensors, as the caller says


def no_progress(done: int, total: int) -> None:
    """Report nothing: the default of an argument of type ProgressReport."""
