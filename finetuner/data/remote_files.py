"""Files read where they lie, over a connection that may break: what was read stays, and reading goes on behind it.

A connection that breaks can look like a file that ends. So bytes are counted against the size that the server said, and
a file that is another one by then (its ETag, date or size) is an error, not a mixture of two.
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

_SECONDS = 60.0  # without a byte
_BUSY = (408, 425, 429, 500, 502, 503, 504)
# The drivers' errors share no class. Theirs are of connections, unless one says that there is no such file.
_DRIVERS = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "httpcore", "httpx", "requests", "s3fs", "urllib3")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


@dataclass(frozen=True)
class Patience:
    """How long to wait before each further try, in seconds, and whom to tell."""

    say: Callable[[str], None] = lambda text: None
    waits: tuple[float, ...] = (1, 2, 4, 8, 16, 32)


PATIENT = Patience()


class Tries:
    """Failures in a row of one connection."""

    def __init__(self, name: str, patience: Patience) -> None:
        self.name, self.patience, self.failures = name, patience, 0

    def failed(self, error: Exception) -> None:
        """Wait for the next try. Raises the error if waiting mends nothing, and LostConnectionError after the last
        try."""
        if isinstance(error, HTTPError):
            error.close()
        if not _may_pass(error):
            raise error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        waits = self.patience.waits
        if self.failures == len(waits):
            raise LostConnectionError(
                f"cannot go on reading '{self.name}': {reason}.\n"
                f"It was tried {len(waits) + 1} times over {sum(waits):g} seconds. Each checkpoint holds the place in "
                "the rows: start again with resume_from_checkpoint=true when the server can be reached."
            ) from error
        wait = waits[self.failures]
        self.failures += 1
        self.patience.say(f"note: the connection to {self.name} broke ({reason}); trying again in {wait:g} s")
        time.sleep(wait)

    def went_well(self) -> None:
        self.failures = 0


def _may_pass(error: Exception) -> bool:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or getattr(chain[-1], "reason", None)) and isinstance(cause, BaseException):
        chain.append(cause)
    if any(isinstance(one, (*_FINAL, DataError)) for one in chain):
        return False
    if isinstance(error, HTTPError):
        return error.code in _BUSY
    kinds = (ConnectionError, TimeoutError, HTTPException)
    return any(isinstance(one, kinds) or _is_of_a_driver(one) or _is_of_a_socket(one) for one in chain)


def _is_of_a_driver(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _DRIVERS


def _is_of_a_socket(error: BaseException) -> bool:
    """URLError, gaierror, SSLError and their kind, but not a file system's."""
    return isinstance(error, OSError) and type(error).__module__ in ("urllib.error", "socket", "ssl", "_socket")


class Opened(NamedTuple):
    """The bytes of a file from a place on; the size of the whole, if it is known; and what tells it from another."""

    raw: Any
    size: int | None
    version: str


class SteadyFile(io.RawIOBase):
    """A file that is opened again where it broke. Raises LostConnectionError, or DataError if it changes meanwhile."""

    def __init__(self, name: str, open_at: Callable[[int], Opened], patience: Patience) -> None:
        super().__init__()
        self.address, self.open_at, self.tries = name, open_at, Tries(name, patience)
        self.at = 0
        self.raw: Any = None
        self.opened = self._opened(first=None)

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
                self.tries.failed(error)
                self.opened = self._opened(first=self.opened)
                continue
            self.at += count
            self.tries.went_well()
            return count

    def close(self) -> None:
        if self.raw is not None:
            self.raw.close()
        super().close()

    def _opened(self, first: Opened | None) -> Opened:
        while True:
            try:
                opened = self.open_at(self.at)
            except Exception as error:  # a driver raises anything
                self.tries.failed(error)
                continue
            if first is not None and (opened.size, opened.version) != (first.size, first.version):
                opened.raw.close()
                raise DataError(f"'{self.address}' was replaced by another file while it was read. Start anew")
            self.raw = opened.raw
            return opened


def open_http(address: str, at: int) -> Opened:
    """The file at an address from byte `at` on."""
    # Identity: the size is then that of the file, and a .gz is not unpacked on its way.
    headers = {"Accept-Encoding": "identity", "User-Agent": "finetuner"} | ({"Range": f"bytes={at}-"} if at else {})
    answer = urlopen(Request(address, headers=headers), timeout=_SECONDS)
    size = answer.headers["Content-Length"]
    if answer.status == 206:
        size = answer.headers["Content-Range"].rpartition("/")[2]
    elif at:  # the server gives whole files only
        _skip(answer, at)
    version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
    return Opened(answer, int(size) if size and size.isdigit() else None, version)


def open_in(fs: Any, place: str, at: int) -> Opened:
    """The same in a filesystem of fsspec."""
    raw = fs.open(place, "rb")
    raw.seek(at)
    return Opened(raw, fs.size(place), fs.ukey(place))


def _skip(raw: Any, count: int) -> None:
    while count:
        some = len(raw.read(min(count, 1 << 20)))
        if not some:
            raise ConnectionError(f"it ended {count:,} bytes too early")
        count -= some
