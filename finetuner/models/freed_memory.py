"""How the C library keeps the memory that it has freed. Only glibc is told anything."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers of its parameters, from malloc.h
SMALL = 128 << 10  # glibc's own first value
LARGEST = 32 << 20  # glibc's own limit of what it raises the threshold to (mallopt(3): 4 MiB x sizeof(long))


@contextmanager
def giving_back() -> Iterator[None]:
    """Blocks of 128 KiB and more go back to the system when they are freed; of what is smaller, 64 MiB are kept.

    glibc raises the first figure, up to 32 MiB, each time that such a block is freed, and keeps what is smaller between
    the blocks that stay: a model that is quantised, or gathered and dequantised layer by layer, leaves the process with
    as much again. Its own second figure is small at first, and loading a model can then spend most of its time on
    getting the same memory again and again. Afterwards both are what they become anyway in a process that frees
    weights: a training step that took all of its memory from the system anew would be slower.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, SMALL)
    libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, LARGEST)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
