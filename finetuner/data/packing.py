"""Pack documents: fill rows of a fixed number of tokens with several uncut documents each."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetuner.data.token_store import Document, TokenStore


@dataclass(frozen=True, eq=False)
class Packs:
    """Rows of several documents of a store: pack i holds the documents members[starts[i]:starts[i + 1]], end to end.

    `members`: (documents,) numbers of documents; `starts`: (packs + 1,); `capacity`: tokens that fit into a pack;
    `packs_per_group`: how many packs are of each group of documents that was packed by itself.
    """

    store: TokenStore
    members: NDArray[np.int64]
    starts: NDArray[np.int64]
    capacity: int
    packs_per_group: tuple[int, ...]

    @classmethod
    def of(cls, store: TokenStore, capacity: int, group_sizes: tuple[int, ...] = ()) -> "Packs":
        """Pack the documents of a store into rows of `capacity` tokens.

        No pack has documents of two groups: the first group_sizes[0] documents, the next group_sizes[1], and so on.
        Default: all documents are one group.
        """
        members, starts, packs_per_group, first = [], [np.zeros(1, dtype=np.int64)], [], 0
        for count in group_sizes or (len(store),):
            group_members, group_starts = best_fit_decreasing(store.lengths[first : first + count], capacity)
            members.append(group_members + first)
            starts.append(group_starts[1:] + starts[-1][-1])
            packs_per_group.append(len(group_starts) - 1)
            first += count
        return cls(store, np.concatenate(members), np.concatenate(starts), capacity, tuple(packs_per_group))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, i: int) -> list[Document]:
        """Documents of pack i, in order."""
        return [self.store.document(int(member)) for member in self.members[self.starts[i] : self.starts[i + 1]]]

    def length(self, i: int) -> int:
        """Tokens of pack i."""
        return int(self.lengths[i])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every pack, shape (packs,)."""
        sums = np.concatenate([[0], np.cumsum(self.store.lengths[self.members])])
        return np.diff(sums[self.starts])

    @property
    def fill(self) -> float:
        """Share of the capacity of all packs that holds tokens, 0 to 1."""
        return self.store.num_tokens / (len(self) * self.capacity)

    @property
    def sha256(self) -> str:
        """Digest of the documents and of which pack each is in."""
        digest = hashlib.sha256(self.store.sha256.encode())
        digest.update(self.members.tobytes())
        digest.update(self.starts.tobytes())
        return digest.hexdigest()


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assign documents to bins of `capacity` tokens by best-fit decreasing.

    `lengths`: tokens, shape (documents,), each 1 to `capacity`. Returns (members, starts), shapes (documents,) and
    (bins + 1,): bin i holds the documents members[starts[i]:starts[i + 1]]. Documents go longest first, each into the
    fullest bin that has room (Johnson 1974: at most 11/9 of the fewest possible bins, plus one); equal lengths in order
    of their number.

    The amounts of free room that some bin has are the set bits of one integer, so the smallest amount that is enough is
    the lowest set bit at or above the length: a few machine words per document.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), "a document fits into a bin"
    order = np.argsort(-lengths, kind="stable")
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if some bin has room for exactly r more tokens
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    for document, length in _as_python_ints(order, lengths):
        fitting_rooms = rooms >> length
        if fitting_rooms:
            room = length + (fitting_rooms & -fitting_rooms).bit_length() - 1
            bins = bins_with_room[room]
            chosen = bins.pop()
            if not bins:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, num_bins
            num_bins += 1
        bin_of[document] = chosen
        left = room - length
        if left:
            if not bins_with_room[left]:
                rooms |= 1 << left
            bins_with_room[left].append(chosen)
    members = np.argsort(bin_of, kind="stable")
    counts = np.bincount(bin_of, minlength=num_bins)
    return members.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _as_python_ints(order: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (document, length) in this order; converted in slices, since Python's ints take ten times the memory."""
    for start in range(0, len(order), 1 << 16):
        documents = order[start : start + (1 << 16)]
        yield from zip(documents.tolist(), lengths[documents].tolist(), strict=True)
