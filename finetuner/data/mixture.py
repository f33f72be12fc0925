"""Choose documents so that each source has the share of the mixture that its `weight` gives it."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from finetuner.data.shuffling import derive_seed, row_order


def select_mixture(
    lengths: Sequence[NDArray[np.int64]], weights: Sequence[float], seed: int, *, by_tokens: bool
) -> list[NDArray[np.bool_]]:
    """Return, for each source, a mask of the documents that the mixture takes, shape (documents of the source,).

    `lengths`: tokens of each source's documents. Source s gives weights[s] / sum(weights) of the documents, or of the
    tokens if `by_tokens`. No document is taken twice: with shares w and sizes n, the mixture has T = min(n / w)
    documents (or tokens), and source s gives T * w[s] of them, drawn by `seed`; at least one document.
    """
    sum_of_weights = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / sum_of_weights for weight in weights]
    sizes = [int(one.sum()) if by_tokens else len(one) for one in lengths]
    total = min(Fraction(size) / share for size, share in zip(sizes, shares, strict=True))
    masks = []
    for number, (source_lengths, share) in enumerate(zip(lengths, shares, strict=True)):
        order = row_order(derive_seed(seed, 0x3A17, number), 0, len(source_lengths))
        wanted = int(total * share)
        count = int(np.searchsorted(np.cumsum(source_lengths[order]), wanted, side="right")) if by_tokens else wanted
        mask = np.zeros(len(source_lengths), dtype=bool)
        mask[order[: max(1, count)]] = True
        masks.append(mask)
    return masks
