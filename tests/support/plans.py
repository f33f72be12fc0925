"""When things happen in a run, as lists; and how hypothesis tries cases."""

from collections.abc import Callable

from hypothesis import settings

many = settings(deadline=None, max_examples=60, derandomize=True)


def when(happens: Callable[[int], bool], total: int) -> list[int]:
    return [done for done in range(1, total + 1) if happens(done)]
