"""Freed memory returned to the system while a model loads. Only glibc has to be told to; other C libraries are not."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers of its parameters, from malloc.h
SMALL = 128 << 10  # glibc's own first value
LARGEST = 32 << 20  # glibc's own limit of what it raises the threshold to (mallopt(3): 4 MiB x sizeof(long))


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Return blocks of 128 KiB and more to the system when they are freed within the `with`, and of smaller ones all
    but 64 MiB.

    glibc raises the first figure, up to 32 MiB, each time that such a block is freed, and does not return what is
    smaller: a model that is quantized, or gathered and dequantized layer by layer, leaves the process with as much
    memory again. Its own second figure is small at first, and loading a model can then spend most of its time on
    getting the same memory again and again. Afterwards both are what they become anyway in a process that frees
    weights: a training step that had to get all of its memory from the system each time would be slower.
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
    """The C library of this process, if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
