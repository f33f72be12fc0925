"""Documents for a tiny model."""

import torch

from finetuner.data.token_store import IGNORE_INDEX, TokenStore

FP32 = {"dtype": torch.float32, "attention": ("sdpa",)}


def documents(count: int = 3) -> TokenStore:
    """Documents of unequal length, whose first half is not trained on."""
    import numpy as np

    generator = np.random.default_rng(1)
    pairs = []
    for i in range(count):
        ids = generator.integers(4, 500, 6 + 5 * i).astype(np.int32)
        labels = ids.copy()
        labels[: len(ids) // 2] = IGNORE_INDEX
        pairs.append((ids, labels))
    return TokenStore.of(pairs)
