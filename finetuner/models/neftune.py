"""NEFTune: uniform noise on the input embeddings while training (Jain et al., arXiv:2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def embedding_noise(
    embedding: nn.Module, alpha: float, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Iterator[None]:
    """Add noise to the output of `embedding`, (rows, length, d), within the `with`: uniform from -s to s in each
    element, s = alpha / sqrt(L d), where L is the number of tokens of the document, without padding.

    attention_mask, position_ids: (rows, length) or None; see document_lengths. The numbers are drawn as dropout's are:
    the loop seeds the generator by (seed, step, rank).
    """
    lengths = document_lengths(attention_mask, position_ids)

    def add_noise(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        """output: (rows, length, d)."""
        scale = alpha / torch.sqrt(lengths.unsqueeze(-1).to(output.dtype) * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1.0, 1.0) * scale

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def document_lengths(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the number of tokens of the document that each position is in: (rows, length) or (rows, 1).

    attention_mask, position_ids: (rows, length). Positions start at 0 in each document of a pack; without them a row is
    one document, padded.
    """
    if position_ids is None:
        assert attention_mask is not None
        return attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
    document = (position_ids == 0).flatten().cumsum(0)
    return document.bincount()[document].reshape(position_ids.shape)
