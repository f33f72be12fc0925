"""The store of tokenized documents, in memory or mapped from files, and the types of their ids and labels."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100  # the label of a token that is not trained on; transformers' and PyTorch's convention

Ids = NDArray[np.int32]
Document = tuple[Ids, Ids]  # (ids, labels), both of shape (tokens,)


class TokenRows(Protocol):
    """Training rows as batches take them: one document a row (TokenStore), or a pack of several (Packs)."""

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def length(self, i: int) -> int:
        """Tokens of row i."""

    def documents(self, i: int) -> list[Document]:
        """Documents of row i, in order."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row, shape (rows,)."""

    @property
    def sha256(self) -> str:
        """Digest of ids, labels and row borders: equal only if training sees the same rows."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """All documents, end to end.

    `ids` and `labels`: (tokens,); document i is ids[offsets[i]:offsets[i + 1]], its labels likewise (a label is the id
    or IGNORE_INDEX). `offsets`: (documents + 1,). `digest` and `trained` are given for a store that is mapped from
    disk, where computing them would read every token.
    """

    ids: Ids
    labels: Ids
    offsets: NDArray[np.int64]
    digest: str | None = None
    trained: int | None = None

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "TokenStore":
        """Return a store that holds a copy of these documents in memory."""
        pairs = list(documents)
        lengths = [len(ids) for ids, _ in pairs]
        empty = np.zeros(0, dtype=np.int32)
        return cls(
            ids=np.concatenate([ids for ids, _ in pairs]) if pairs else empty,
            labels=np.concatenate([labels for _, labels in pairs]) if pairs else empty,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> Document:
        """Return (ids, labels) of document i as views, without a copy."""
        tokens = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[tokens], self.labels[tokens]

    def documents(self, i: int) -> list[Document]:
        """Return document i as a row of one document (see TokenRows)."""
        return [self.document(i)]

    def length(self, i: int) -> int:
        """Tokens of document i."""
        return int(self.offsets[i + 1] - self.offsets[i])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, shape (documents,)."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 if the store is empty."""
        return int(self.lengths.max(initial=0))

    @property
    def sha256(self) -> str:
        """Digest of all ids, labels and document borders: equal only if training sees the same documents."""
        if self.digest is not None:
            return self.digest
        return combine_digests(*(hashlib.sha256(array.tobytes()) for array in (self.ids, self.labels, self.offsets)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Labels that a loss counts: the first token of a document has no position that predicts it."""
        if self.trained is not None:
            return self.trained
        counted = self.labels != IGNORE_INDEX
        counted[self.offsets[:-1][np.diff(self.offsets) > 0]] = False
        return int(counted.sum())


def join_documents(documents: Iterable[Document]) -> Document:
    """Return the documents end to end as one, whose tokens all see those before them."""
    pairs = list(documents)
    return np.concatenate([ids for ids, _ in pairs]), np.concatenate([labels for _, labels in pairs])


def combine_digests(*digests: "hashlib._Hash") -> str:
    """Return one sha256 of several digests, in this order."""
    return hashlib.sha256("".join(digest.hexdigest() for digest in digests).encode()).hexdigest()
