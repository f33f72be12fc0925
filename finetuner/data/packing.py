"""Documents -> packs: rows that are filled with several whole documents."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetuner.data.token_store import Ids, TokenStore


@dataclass(frozen=True, eq=False)
class Packs:
    """Pack i holds the documents members[starts[i]:starts[i + 1]] of the store, end to end. `parts`: how many packs
    are of each part of the store."""

    store: TokenStore
    members: NDArray[np.int64]
    starts: NDArray[np.int64]
    capacity: int
    parts: tuple[int, ...]

    @classmethod
    def of(cls, store: TokenStore, capacity: int, parts: tuple[int, ...] = ()) -> "Packs":
        """`parts` documents each are packed by themselves; default: all are one part."""
        members, starts, sizes, first = [], [np.zeros(1, dtype=np.int64)], [], 0
        for count in parts or (len(store),):
            chosen, borders = best_fit_decreasing(store.lengths[first : first + count], capacity)
            members.append(chosen + first)
            starts.append(borders[1:] + starts[-1][-1])
            sizes.append(len(borders) - 1)
            first += count
        return cls(store, np.concatenate(members), np.concatenate(starts), capacity, tuple(sizes))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, i: int) -> list[tuple[Ids, Ids]]:
        return [self.store.document(int(member)) for member in self.members[self.starts[i] : self.starts[i + 1]]]

    def length(self, i: int) -> int:
        return int(self.lengths[i])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        sums = np.concatenate([[0], np.cumsum(self.store.lengths[self.members])])
        return np.diff(sums[self.starts])

    @property
    def fill(self) -> float:
        """The share of the packs' room that holds tokens."""
        return self.store.num_tokens / (len(self) * self.capacity)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.store.sha256.encode())
        digest.update(self.members.tobytes())
        digest.update(self.starts.tobytes())
        return digest.hexdigest()


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(members, starts): bin i holds members[starts[i]:starts[i + 1]], at most `capacity` in all.

    Longest first, each into the fullest bin that has room (Johnson 1974: at most 11/9 of the fewest bins, and one).
    Which amounts of room are to be had stands in the bits of one number, so that the smallest that is enough is the
    lowest bit at or above the length: a few machine words per document. Equal lengths go in order of their number.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), "a document fits into a bin"
    order = np.argsort(-lengths, kind="stable")
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    for document, length in _numbers(order, lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
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


def _numbers(order: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(document, length) as Python's numbers, which take ten times the room of an array's: some at a time."""
    for start in range(0, len(order), 1 << 16):
        some = order[start : start + (1 << 16)]
        yield from zip(some.tolist(), lengths[some].tolist(), strict=True)
