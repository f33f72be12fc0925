"""A signal becomes a wish that the loop grants at the end of a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_wishes(announce: Callable[[str], None]) -> Iterator[StopWish]:
    """SIGTERM (a batch system's warning) and the first Ctrl-C are wishes; the second Ctrl-C stops at once."""
    wish = StopWish()

    def asked(number: int, frame: FrameType | None) -> None:
        if wish and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.signal = signal.Signals(number)
        announce(f"{wish.signal.name}: saving after this step, then stopping (Ctrl-C stops at once)")

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield wish
        return
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
