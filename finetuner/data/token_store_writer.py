"""Tokens on disk: written as they come, mapped when they are read, so that neither takes memory."""

import hashlib
import os
from array import array
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetuner.data.token_store import Ids, TokenStore, joined_digest

_WAITING_TOKENS = 1 << 17  # are written at once: documents are often too short to be worth a call each


class Collector(Protocol):
    """Takes documents one by one, and gives the store of them."""

    def add(self, ids: Ids, labels: Ids) -> None: ...

    def __len__(self) -> int: ...

    def finish(self) -> TokenStore: ...


class MemoryCollector:
    """Keeps the documents."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Ids, Ids]] = []

    def add(self, ids: Ids, labels: Ids) -> None:
        self.pairs.append((ids, labels))

    def __len__(self) -> int:
        return len(self.pairs)

    def finish(self) -> TokenStore:
        return TokenStore.of(self.pairs)


class FileCollector:
    """Writes the documents to `folder`/`name`.ids and .labels (32 bit) and their borders to .offsets (64 bit)."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.files = [(folder / f"{name}.{part}").open("wb") for part in ("ids", "labels")]
        self.digests = [hashlib.sha256(), hashlib.sha256()]
        self.offsets = array("q", [0])
        self.trained = 0
        self.waiting: list[tuple[Ids, Ids]] = []
        self.num_written = 0

    def add(self, ids: Ids, labels: Ids) -> None:
        self.waiting.append((ids, labels))
        self.offsets.append(self.offsets[-1] + len(ids))
        if self.offsets[-1] - self.num_written >= _WAITING_TOKENS:
            self._write()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def finish(self) -> TokenStore:
        self._write()
        borders = memoryview(self.offsets).cast("B")
        with (self.folder / f"{self.name}.offsets").open("wb") as file_of_borders:
            file_of_borders.write(borders)
            file_of_borders.flush()
            os.fsync(file_of_borders.fileno())
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        digest = joined_digest(*self.digests, hashlib.sha256(borders))
        return map_store(self.folder, self.name, {"sha256": digest, "trained": self.trained})

    def _write(self) -> None:
        if not self.waiting:
            return
        store = TokenStore.of(self.waiting)
        for part, file, digest in zip((store.ids, store.labels), self.files, self.digests, strict=True):
            data = part.tobytes()
            file.write(data)
            digest.update(data)
        self.trained += store.num_trained
        self.num_written += store.num_tokens
        self.waiting.clear()


def map_store(folder: Path, name: str, facts: dict[str, Any]) -> TokenStore:
    """The store that a FileCollector wrote; `facts` are what store_facts said of it."""
    return TokenStore(
        ids=_mapped(folder / f"{name}.ids", np.int32),
        labels=_mapped(folder / f"{name}.labels", np.int32),
        offsets=_mapped(folder / f"{name}.offsets", np.int64),
        digest=facts["sha256"],
        trained=facts["trained"],
    )


def store_facts(store: TokenStore) -> dict[str, Any]:
    """What map_store needs, so that it need not read all tokens."""
    return {"sha256": store.sha256, "trained": store.num_trained}


def _mapped(path: Path, dtype: type) -> NDArray[Any]:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
