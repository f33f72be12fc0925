"""How much is taken of each source where the recipe gives weights."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from finetuner.data.shuffling import mix, row_order


def mixed(
    lengths: Sequence[NDArray[np.int64]], weights: Sequence[float], seed: int, *, by_tokens: bool
) -> list[NDArray[np.bool_]]:
    """Which documents of each source are learned, so that source s gives weights[s] / sum(weights) of the rows, or of
    the tokens; `lengths` are those of the sources' documents, in tokens.

    No document is taken twice: with shares w and sizes n, the mixture has T = min(n / w) rows (or tokens), and source s
    gives T w of them, drawn by seed; one document at least.
    """
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    sizes = [int(one.sum()) if by_tokens else len(one) for one in lengths]
    whole = min(Fraction(size) / share for size, share in zip(sizes, shares, strict=True))
    chosen = []
    for number, (one, share) in enumerate(zip(lengths, shares, strict=True)):
        order = row_order(mix(seed, 0x3A17, number), 0, len(one))
        wanted = int(whole * share)
        count = int(np.searchsorted(np.cumsum(one[order]), wanted, side="right")) if by_tokens else wanted
        mask = np.zeros(len(one), dtype=bool)
        mask[order[: max(1, count)]] = True
        chosen.append(mask)
    return chosen
