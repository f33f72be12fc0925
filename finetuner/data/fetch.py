"""Data files by their address (https://, s3://, gs:// and what else fsspec knows) -> files on this disk.

    <folder>/<address>-<fingerprint>/<name>    the file as the server had it when its ETag, date and size were these

A copy is complete or absent. Where the server cannot be reached, the newest copy is taken.
"""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from finetuner.errors import DataError
from finetuner.recipe.rules import DATA_SUFFIXES
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors

DOWNLOAD_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30.0  # without a byte
_VERSION_HEADERS = ("etag", "last-modified", "content-length")


def is_address(path: str) -> bool:
    return "://" in path


def fetch(address: str, folder: Path) -> list[Path]:
    """Download the files behind an address into `folder`, unless they are in it: one, or those of a bucket's folder or
    of a pattern. Return their paths. Raises DataError."""
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
                shutil.copyfileobj(source, target, DOWNLOAD_CHUNK_BYTES)

        return run

    return [_cached(f"{address} {name}", Path(name).name, facts[name], folder, download(name)) for name in found]


def data_files_in(fs: Any, place: str) -> list[str]:
    """Sorted paths of the data files in a bucket's folder, at any depth."""
    return sorted(name for name in fs.find(place) if name.endswith(DATA_SUFFIXES))


def open_filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's filesystem for an address, and the path in it. Raises DataError if its driver is not
    installed."""
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
        with urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            facts = {key: answer.headers[key] for key in _VERSION_HEADERS if key in answer.headers}
            return _cached(address, name, facts, folder, lambda target: _copy_all(answer, target, address))
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


def _copy_all(answer: HTTPResponse, target: IO[bytes], address: str) -> None:
    """Copy the answer's body. Raises DataError if it is shorter than its header says: a connection that breaks looks
    like a file that ends."""
    shutil.copyfileobj(answer, target, DOWNLOAD_CHUNK_BYTES)
    if answer.length:
        raise DataError(f"cannot read '{address}': the connection broke {answer.length} bytes before the end.")


def _cached(address: str, name: str, facts: Any, folder: Path, download: Callable[[IO[bytes]], None]) -> Path:
    """Return the cached copy of the file that has these facts; if there is none, one process downloads it."""

    def fill(staging: Path) -> None:
        with (staging / name).open("wb") as target:
            download(target)

    copy = folder / f"{_digest(address)}-{_digest(json.dumps(facts, sort_keys=True, default=str))}"
    with explain_disk_errors(DataError, f"cannot write '{name}' to '{folder}'", "Make room."):
        return build_once(copy, fill, is_builder=True) / name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _unreachable(address: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"cannot read '{address}': {reason}.\nCheck the address, the network and your rights to it."
