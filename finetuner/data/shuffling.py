"""The order of rows: a pure function of (seed, epoch, position), the same on every machine and library version."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetuner.plan.schedule import ceil_of

_GOLDEN = 0x9E3779B97F4A7C15
SORTED_STEPS = 50  # steps whose rows are sorted by length together


def derive_seed(*values: int) -> int:
    """Return a 64-bit seed that depends on all values, by SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    state = 0
    for value in values:
        state = int(_splitmix64(np.array([state ^ (value & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64))[0])
    return state


@lru_cache(maxsize=4)
def row_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """Return a permutation of range(num_rows), shape (num_rows,): rows sorted by a hash of (seed, epoch, row)."""
    keys = _splitmix64(np.arange(num_rows, dtype=np.uint64) ^ np.uint64(derive_seed(seed, epoch, 0x0DE2)))
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)  # callers share the cached array
    return order


def row_order_by_length(seed: int, epoch: int, lengths: NDArray[np.int64], global_batch: int) -> NDArray[np.int64]:
    """Return a permutation of the rows, shape (rows,), in which the rows of one step have similar lengths.

    The rows of SORTED_STEPS random steps are sorted by length (`lengths`: tokens, shape (rows,)), cut into steps of
    `global_batch` rows, and all steps are shuffled. An epoch's last, smaller step takes the remaining rows unsorted.
    """
    order = row_order(seed, epoch, len(lengths))
    num_steps = len(order) // global_batch
    steps = []
    for start in range(0, num_steps * global_batch, SORTED_STEPS * global_batch):
        group = order[start : min(start + SORTED_STEPS * global_batch, num_steps * global_batch)]
        group = group[np.argsort(-lengths[group], kind="stable")]
        steps += list(group.reshape(-1, global_batch))
    shuffled = [steps[i] for i in row_order(derive_seed(seed, 0x6127), epoch, num_steps)]
    return np.concatenate([*shuffled, order[num_steps * global_batch :]])


def held_out_rows(seed: int, num_rows: int, size: float) -> NDArray[np.bool_]:
    """Return a mask, shape (num_rows,), of the rows that `val_set_size` holds out.

    `size` below 1 is a fraction of the rows, rounded up; from 1 on it is a number of rows.
    """
    count = int(size) if size >= 1 else ceil_of(size, num_rows)
    mask = np.zeros(num_rows, dtype=bool)
    mask[row_order(derive_seed(seed, 0x5917), 0, num_rows)[:count]] = True
    return mask


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = values + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
