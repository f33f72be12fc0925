"""Read remote files through connections that may break: reconnect, and go on at the byte that was reached.

A connection that breaks can look like a file that ends, so bytes are counted against the size that the server gave. A
file that was replaced meanwhile (another ETag, date or size) is an error, not a mixture of two versions.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from finetuner.errors import DataError, LostConnectionError

_TIMEOUT_SECONDS = 60.0  # without a byte
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
# The errors of fsspec's drivers share no class: all are taken for connection errors, unless one is in _FINAL.
_DRIVERS = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "httpcore", "httpx", "requests", "s3fs", "urllib3")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds to wait before each further attempt, and a callback that is told of them."""

    say: Callable[[str], None] = lambda text: None
    wait_seconds: tuple[float, ...] = (1, 2, 4, 8, 16, 32)


DEFAULT_RETRY = RetryPolicy()


class Retries:
    """The attempts at one connection: waits after each failure, longer after each in a row."""

    def __init__(self, name: str, policy: RetryPolicy) -> None:
        self.name, self.policy, self.num_failures = name, policy, 0

    def failed(self, error: Exception) -> None:
        """Wait before the next attempt.

        Raises `error` if it is not one of the connection, and LostConnectionError after the last attempt.
        """
        if isinstance(error, HTTPError):
            error.close()
        if not _is_temporary(error):
            raise error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        waits = self.policy.wait_seconds
        if self.num_failures == len(waits):
            raise LostConnectionError(
                f"cannot go on reading '{self.name}': {reason}.\n"
                f"It was tried {len(waits) + 1} times over {sum(waits):g} seconds. Each checkpoint holds the place in "
                "the rows: start again with resume_from_checkpoint=true when the server can be reached."
            ) from error
        wait = waits[self.num_failures]
        self.num_failures += 1
        self.policy.say(f"note: the connection to {self.name} broke ({reason}); trying again in {wait:g} s")
        time.sleep(wait)

    def succeeded(self) -> None:
        self.num_failures = 0


def _is_temporary(error: Exception) -> bool:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or getattr(chain[-1], "reason", None)) and isinstance(cause, BaseException):
        chain.append(cause)
    if any(isinstance(one, (*_FINAL, DataError)) for one in chain):
        return False
    if isinstance(error, HTTPError):
        return error.code in _RETRIED_STATUS
    kinds = (ConnectionError, TimeoutError, HTTPException)
    return any(isinstance(one, kinds) or _is_driver_error(one) or _is_network_error(one) for one in chain)


def _is_driver_error(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _DRIVERS


def _is_network_error(error: BaseException) -> bool:
    """Return whether it is an OSError of the network (URLError, gaierror, SSLError ...), not of a file system."""
    return isinstance(error, OSError) and type(error).__module__ in ("urllib.error", "socket", "ssl", "_socket")


class OpenedFile(NamedTuple):
    """A remote file, opened at some byte.

    `raw`: a stream of the bytes from there on. `size`: bytes of the full file, None if unknown. `version`: an ETag or
    date; another version of the file has another.
    """

    raw: Any
    size: int | None
    version: str


class ReconnectingFile(io.RawIOBase):
    """A file that is opened again at the byte where its connection broke.

    Reading raises LostConnectionError if it cannot be opened again, and DataError if it was replaced meanwhile.
    """

    def __init__(self, name: str, open_at: Callable[[int], OpenedFile], policy: RetryPolicy) -> None:
        """`open_at(byte)` opens the file from that byte on."""
        super().__init__()
        self.address, self.open_at, self.retries = name, open_at, Retries(name, policy)
        self.at = 0  # the next byte
        self.raw: Any = None
        self.opened = self._open(expected=None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                count: int = self.raw.readinto(buffer)
                if not count and self.opened.size is not None and self.at < self.opened.size and len(buffer):
                    raise ConnectionError(f"it ended {self.opened.size - self.at:,} bytes too early")
            except Exception as error:  # a driver raises anything
                self.raw.close()
                self.retries.failed(error)
                self.opened = self._open(expected=self.opened)
                continue
            self.at += count
            self.retries.succeeded()
            return count

    def close(self) -> None:
        if self.raw is not None:
            self.raw.close()
        super().close()

    def _open(self, expected: OpenedFile | None) -> OpenedFile:
        while True:
            try:
                opened = self.open_at(self.at)
            except Exception as error:  # a driver raises anything
                self.retries.failed(error)
                continue
            if expected is not None and (opened.size, opened.version) != (expected.size, expected.version):
                opened.raw.close()
                raise DataError(f"'{self.address}' was replaced by another file while it was read. Start again")
            self.raw = opened.raw
            return opened


def open_http_at(address: str, at: int) -> OpenedFile:
    """Open the file at an http(s) address from byte `at` on."""
    # Identity: otherwise Content-Length would be the size of a compressed transfer, and a .gz might be unpacked.
    headers = {"Accept-Encoding": "identity", "User-Agent": "finetuner"} | ({"Range": f"bytes={at}-"} if at else {})
    answer = urlopen(Request(address, headers=headers), timeout=_TIMEOUT_SECONDS)
    size = answer.headers["Content-Length"]
    if answer.status == 206:
        size = answer.headers["Content-Range"].rpartition("/")[2]
    elif at:  # the server ignores Range and sends the file from its start
        _skip(answer, at)
    version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
    return OpenedFile(answer, int(size) if size and size.isdigit() else None, version)


def open_fsspec_at(fs: Any, place: str, at: int) -> OpenedFile:
    """Open a file of an fsspec filesystem from byte `at` on."""
    raw = fs.open(place, "rb")
    raw.seek(at)
    return OpenedFile(raw, fs.size(place), fs.ukey(place))


def _skip(raw: Any, num_bytes: int) -> None:
    while num_bytes:
        num_read = len(raw.read(min(num_bytes, 1 << 20)))
        if not num_read:
            raise ConnectionError(f"it ended {num_bytes:,} bytes too early")
        num_bytes -= num_read
