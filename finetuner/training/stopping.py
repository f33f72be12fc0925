"""Signals as stop requests, honored at the end of a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_requests(announce: Callable[[str], None]) -> Iterator[StopRequest]:
    """Treat SIGTERM (a batch system's warning) and the first Ctrl-C as requests; the second Ctrl-C stops at once."""
    request = StopRequest()

    def asked(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        announce(f"{request.signal.name}: saving after this step, then stopping (Ctrl-C stops at once)")

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield request
        return
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
