"""Data files by their address (https://, s3://, gs:// and what else fsspec knows) -> files on this disk.

    <folder>/<address>-<fingerprint>/<name>    the file as the server had it when its ETag, date and size were these

A copy is written aside and renamed. Where the server cannot be reached, the newest copy is taken.
"""

import fcntl
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from finetuner.errors import DataError
from finetuner.recipe.rules import DATA_SUFFIXES

CHUNK = 1 << 20
_SECONDS = 30.0  # without a byte
_OF_A_COPY = ("etag", "last-modified", "content-length")


def is_address(path: str) -> bool:
    return "://" in path


def fetch(address: str, folder: Path) -> list[Path]:
    """The files behind an address, brought into `folder` unless they are there: one, or those of a bucket's folder or
    of a pattern. Raises DataError."""
    if address.startswith(("http://", "https://")):
        return [_fetch_http(address, folder)]
    fs, place = open_filesystem(address)
    try:
        found: list[str] = sorted(fs.glob(place)) if "*" in place else [place]
        if "*" not in place and fs.isdir(place):
            found = data_files_in(fs, place)
        facts = {name: fs.info(name) for name in found}
    except Exception as error:  # a driver raises anything
        raise DataError(_unreachable(address, error)) from error
    if not found:
        raise DataError(f"'{address}' has no data file ({', '.join(DATA_SUFFIXES)}).")

    def download(name: str) -> Callable[[IO[bytes]], None]:
        def run(target: IO[bytes]) -> None:
            with fs.open(name, "rb") as source:
                shutil.copyfileobj(source, target, CHUNK)

        return run

    return [_kept(f"{address} {name}", Path(name).name, facts[name], folder, download(name)) for name in found]


def data_files_in(fs: Any, place: str) -> list[str]:
    """The data files of a bucket's folder, and of those in it."""
    return sorted(name for name in fs.find(place) if name.endswith(DATA_SUFFIXES))


def open_filesystem(address: str) -> tuple[Any, str]:
    """fsspec's filesystem of an address, and the place in it. Raises DataError if its driver is not installed."""
    import fsspec

    try:
        fs, place = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise DataError(f"'{address}' needs a package that is not installed.\n{_how_to_install(address)}") from error
    except ValueError as error:
        raise DataError(f"cannot read '{address}': {error}.") from error
    except Exception as error:  # a driver raises anything
        raise DataError(_unreachable(address, error)) from error
    return fs, place


def _how_to_install(address: str) -> str:
    known = importlib.import_module("fsspec.registry").known_implementations
    package = known[urlsplit(address).scheme]["class"].split(".")[0]
    return f"Type: pip install {'aiohttp requests' if package == 'fsspec' else package}"


def _fetch_http(address: str, folder: Path) -> Path:
    name = Path(urlsplit(address).path).name or "data"
    # Identity: the size is then that of the file, and a .gz is not unpacked on its way.
    request = Request(address, headers={"Accept-Encoding": "identity", "User-Agent": "finetuner"})
    try:
        with urlopen(request, timeout=_SECONDS) as answer:
            facts = {key: answer.headers[key] for key in _OF_A_COPY if key in answer.headers}
            return _kept(address, name, facts, folder, lambda target: _copy_whole(answer, target, address))
    except HTTPError as error:
        error.close()
        raise DataError(
            f"cannot read '{address}': the server answers {error.code} {error.reason}.\nCheck the address."
        ) from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        earlier = sorted(folder.glob(f"{_digest(address)}-*/*"), key=lambda path: path.stat().st_mtime)
        if earlier:
            return earlier[-1]
        raise DataError(_unreachable(address, error)) from error


def _copy_whole(answer: HTTPResponse, target: IO[bytes], address: str) -> None:
    """A connection that breaks ends like a file that ends, but for its length."""
    shutil.copyfileobj(answer, target, CHUNK)
    if answer.length:
        raise DataError(f"cannot read '{address}': the connection broke {answer.length} bytes before the end.")


def _kept(address: str, name: str, facts: Any, folder: Path, download: Callable[[IO[bytes]], None]) -> Path:
    """The copy of the file that has these facts, downloaded if it is not there. One process downloads, others wait."""
    final = folder / f"{_digest(address)}-{_digest(json.dumps(facts, sort_keys=True, default=str))}"
    if not final.is_dir():
        with held(final.with_name(f"{final.name}.lock")):
            if not final.is_dir():
                aside = final.with_name(f"{final.name}.{os.getpid()}.tmp")
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                try:
                    with (aside / name).open("wb") as target:
                        download(target)
                    aside.rename(final)
                except OSError as error:
                    raise DataError(f"cannot write '{name}' to '{folder}': {error.strerror}. Make room.") from error
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    return final / name


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for it; the kernel lets go of it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _unreachable(address: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"cannot read '{address}': {reason}.\nCheck the address, the network and your rights to it."
