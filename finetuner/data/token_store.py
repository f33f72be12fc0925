"""Token ids and labels: of one document, of all of them, of rows that hold them already."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetuner.data.formats import cell_of
from finetuner.errors import DataError

IGNORE = -100  # the label of a token that is not trained on; transformers' and PyTorch's convention

Ids = NDArray[np.int32]
Document = tuple[Ids, Ids]  # ids and labels


class Rows(Protocol):
    """What batches are made of: documents (TokenStore), or packs of them (Packs)."""

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def length(self, i: int) -> int:
        """Tokens of row i."""

    def documents(self, i: int) -> list[tuple[Ids, Ids]]:
        """(ids, labels) of each document in row i."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of all rows, in tokens."""

    @property
    def sha256(self) -> str:
        """Equal only if the same is learned from the same rows."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """All documents, end to end: document i is ids[offsets[i]:offsets[i + 1]], its labels likewise (ids or IGNORE).

    `digest` and `trained` are those of a store that was read from disk, where counting would read it all.
    """

    ids: Ids
    labels: Ids
    offsets: NDArray[np.int64]
    digest: str | None = None
    trained: int | None = None

    @classmethod
    def of(cls, documents: Iterable[tuple[Ids, Ids]]) -> "TokenStore":
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

    def document(self, i: int) -> tuple[Ids, Ids]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.labels[part]

    def documents(self, i: int) -> list[tuple[Ids, Ids]]:
        return [self.document(i)]

    def length(self, i: int) -> int:
        return int(self.offsets[i + 1] - self.offsets[i])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 if there is none."""
        return int(self.lengths.max(initial=0))

    @property
    def sha256(self) -> str:
        """Of all ids, labels and borders: equal only if the same is learned."""
        if self.digest is not None:
            return self.digest
        return joined_digest(*(hashlib.sha256(part.tobytes()) for part in (self.ids, self.labels, self.offsets)))

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Labels that a loss counts: the first token of a document has no position that predicts it."""
        if self.trained is not None:
            return self.trained
        counted = self.labels != IGNORE
        counted[self.offsets[:-1][np.diff(self.offsets) > 0]] = False
        return int(counted.sum())


def joined_digest(*parts: "hashlib._Hash") -> str:
    """One digest of several."""
    return hashlib.sha256("".join(part.hexdigest() for part in parts).encode()).hexdigest()


def read_tokens(row: Mapping[str, Any], vocab_size: int) -> tuple[Ids, Ids]:
    """(ids, labels) of a row that is tokenised already: columns input_ids and labels, and attention_mask if there is
    padding, which is left out. Raises DataError if they are not token ids of this vocabulary, or differ in length."""
    columns = []
    for name in ("input_ids", "labels"):
        cell = cell_of(row, name)
        try:
            columns.append(np.array(cell, dtype=np.int64).reshape(-1))
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"column '{name}' must be a list of token ids; it is {cell!r:.60}") from None
    ids, labels = columns
    mask = row.get("attention_mask")
    kept = np.ones(len(ids), dtype=bool) if mask is None else np.array(mask, dtype=bool)
    if not len(ids) == len(labels) == len(kept):
        raise DataError(f"{len(ids)} input_ids, {len(labels)} labels and {len(kept)} attention_mask must be equal many")
    ids, labels = ids[kept], labels[kept]
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise DataError(f"input_ids has {wrong[0]}, but the tokenizer's ids are 0 to {vocab_size - 1}")
    strange = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))]
    if len(strange):
        raise DataError(f"labels has {strange[0]}, but must be token ids, or {IGNORE} where nothing is learned")
    return ids.astype(np.int32), labels.astype(np.int32)
