"""Write documents to a TokenStore one at a time: in memory, or in files that are mapped when they are read.

<folder>/<name>.ids, <name>.labels   int32, all documents end to end
<folder>/<name>.offsets              int64, where each document begins, and the end
"""

import hashlib
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from finetuner.data.token_store import Document, Ids, TokenStore, combine_digests

_BUFFERED_TOKENS = 1 << 17  # written in one call: documents are often too short to be worth a call each


class TokenCounts(NamedTuple):
    """Tokens of documents, and those of them that a loss counts."""

    tokens: int = 0
    trained: int = 0


class TokenStoreWriter(Protocol):
    """A sink for documents, added one by one; `finish` returns the store of all of them."""

    def add(self, ids: Ids, labels: Ids) -> None: ...

    def __len__(self) -> int: ...

    def token_counts(self) -> TokenCounts:
        """Return the tokens of the documents so far, and those of them that a loss counts."""

    def finish(self) -> TokenStore: ...


class MemoryWriter:
    """A writer that collects documents in memory."""

    def __init__(self) -> None:
        self.documents: list[Document] = []

    def add(self, ids: Ids, labels: Ids) -> None:
        self.documents.append((ids, labels))

    def __len__(self) -> int:
        return len(self.documents)

    def token_counts(self) -> TokenCounts:
        return count_tokens(self.documents)

    def finish(self) -> TokenStore:
        return TokenStore.of(self.documents)


class FileWriter:
    """A writer that appends documents to files as they come, so that memory does not grow with them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.files = [(folder / f"{name}.{column}").open("wb") for column in ("ids", "labels")]
        self.digests = [hashlib.sha256(), hashlib.sha256()]
        self.offsets = array("q", [0])
        self.num_trained = 0
        self.buffer: list[Document] = []
        self.num_written = 0

    def add(self, ids: Ids, labels: Ids) -> None:
        """Append one document; (tokens,) each."""
        self.buffer.append((ids, labels))
        self.offsets.append(self.offsets[-1] + len(ids))
        if self.offsets[-1] - self.num_written >= _BUFFERED_TOKENS:
            self._flush()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def token_counts(self) -> TokenCounts:
        self._flush()
        return TokenCounts(self.num_written, self.num_trained)

    def finish(self) -> TokenStore:
        """Flush and fsync the files, and return them mapped."""
        self._flush()
        offsets = memoryview(self.offsets).cast("B")
        with (self.folder / f"{self.name}.offsets").open("wb") as offsets_file:
            offsets_file.write(offsets)
            offsets_file.flush()
            os.fsync(offsets_file.fileno())
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        digest = combine_digests(*self.digests, hashlib.sha256(offsets))
        return map_store(self.folder, self.name, {"sha256": digest, "trained": self.num_trained})

    def _flush(self) -> None:
        if not self.buffer:
            return
        store = TokenStore.of(self.buffer)
        for column, file, digest in zip((store.ids, store.labels), self.files, self.digests, strict=True):
            data = column.tobytes()
            file.write(data)
            digest.update(data)
        self.num_trained += store.num_trained
        self.num_written += store.num_tokens
        self.buffer.clear()


def count_tokens(documents: Iterable[Document]) -> TokenCounts:
    """Return the tokens of documents, and those of them that a loss counts."""
    store = TokenStore.of(documents)
    return TokenCounts(store.num_tokens, store.num_trained)


def map_store(folder: Path, name: str, facts: dict[str, Any]) -> TokenStore:
    """Map the files that a FileWriter wrote; `facts` is what `store_facts` returned for its store."""
    return TokenStore(
        ids=_map_array(folder / f"{name}.ids", np.int32),
        labels=_map_array(folder / f"{name}.labels", np.int32),
        offsets=_map_array(folder / f"{name}.offsets", np.int64),
        digest=facts["sha256"],
        trained=facts["trained"],
    )


def store_facts(store: TokenStore) -> dict[str, Any]:
    """Return the figures to save beside a store's files, which `map_store` could get only by reading every token."""
    return {"sha256": store.sha256, "trained": store.num_trained}


def _map_array(path: Path, dtype: type) -> NDArray[Any]:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
