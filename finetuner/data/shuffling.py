"""The order of rows: a pure function of (seed, epoch, position), the same on every machine and library version."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetuner.plan.schedule import ceil_of

_GOLDEN = 0x9E3779B97F4A7C15


def mix(*values: int) -> int:
    """One well-spread 64-bit number from several; SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    state = 0
    for value in values:
        state = int(_splitmix64(np.array([state ^ (value & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64))[0])
    return state


@lru_cache(maxsize=4)
def row_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """A permutation of range(num_rows): rows sorted by a hash of (seed, epoch, row)."""
    keys = _splitmix64(np.arange(num_rows, dtype=np.uint64) ^ np.uint64(mix(seed, epoch, 0x0DE2)))
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)  # it is shared by the cache
    return order


GROUP_STEPS = 50


def order_by_length(seed: int, epoch: int, lengths: NDArray[np.int64], global_batch: int) -> NDArray[np.int64]:
    """A permutation in which the rows of a step are of like length, and the steps come in any order.

    The rows of GROUP_STEPS random steps are sorted by length, cut into steps anew, and all steps are shuffled. The rows
    of an epoch's last, smaller step are any.
    """
    order = row_order(seed, epoch, len(lengths))
    num_steps = len(order) // global_batch
    steps = []
    for start in range(0, num_steps * global_batch, GROUP_STEPS * global_batch):
        group = order[start : min(start + GROUP_STEPS * global_batch, num_steps * global_batch)]
        group = group[np.argsort(-lengths[group], kind="stable")]
        steps += list(group.reshape(-1, global_batch))
    shuffled = [steps[i] for i in row_order(mix(seed, 0x6127), epoch, num_steps)]
    return np.concatenate([*shuffled, order[num_steps * global_batch :]])


def held_out_rows(seed: int, num_rows: int, size: float) -> NDArray[np.bool_]:
    """Which rows `val_set_size` holds out: a fraction below 1 (rounded up), or that many rows."""
    count = int(size) if size >= 1 else ceil_of(size, num_rows)
    out = np.zeros(num_rows, dtype=bool)
    out[row_order(mix(seed, 0x5917), 0, num_rows)[:count]] = True
    return out


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = values + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
