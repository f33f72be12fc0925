"""Sums over the logits of trained positions, without (tokens x vocabulary) logits in memory.

The head is composed around the decoder, not patched into it: the decoder is called, the positions that are trained on
are kept, and the head's logits are taken in chunks that are recomputed in the backward.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetuner.data.batches import BatchTensors
from finetuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# fp32 logits of one chunk. Larger chunks are no faster; smaller ones launch more kernels.
CHUNK_BYTES = 2**28

# (n, vocabulary) fp32 logits of the trained positions of a slice -> sums of any fixed shape
ChunkSums = Callable[[torch.Tensor, slice], torch.Tensor]


def sum_over_logits(
    model: "PreTrainedModel",
    batch: BatchTensors,
    chunk_sums: ChunkSums,
    *,
    composed: bool,
    activations: AbstractContextManager[None] | None = None,
) -> torch.Tensor:
    """Return `chunk_sums` summed over the trained positions of a batch, in the shape that it gives.

    `composed`: what head_is_composable says of the model; if not, the model's own forward makes all its logits.
    `activations`: the context of the decoder's forward.
    """
    context = activations or nullcontext()
    positions = batch["positions"]
    assert positions is not None
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False,
    }  # fmt: skip
    if batch["position_ids"] is not None:  # some models have no such argument
        inputs["position_ids"] = batch["position_ids"]
    if not composed:
        with context:
            logits = model(**inputs).logits
        return chunk_sums(logits.flatten(0, 1)[positions].float(), slice(0, len(positions)))
    with context:
        states = decoder_of(model)(**inputs)[0]
    hidden = states.flatten(0, 1)[positions]
    head, soft_cap = model.get_output_embeddings(), _soft_cap(model)

    def of_chunk(chunk: torch.Tensor, where: slice) -> torch.Tensor:
        return chunk_sums(_cap(head(chunk).float(), soft_cap), where)

    rows = max(1, CHUNK_BYTES // (4 * _vocab_size(model)))
    if len(positions) <= rows:
        return of_chunk(hidden, slice(0, len(positions)))
    sums = [
        checkpoint(of_chunk, chunk, slice(start, start + len(chunk)), use_reentrant=False)
        for start, chunk in zip(range(0, len(positions), rows), hidden.split(rows), strict=True)
    ]
    return torch.stack(sums).sum(dim=0)


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """Return the model without its head: token ids in, hidden states (rows, length, width) out."""
    return getattr(model, model.base_model_prefix)


def _soft_cap(model: "PreTrainedModel") -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def _cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap  # Gemma 2, arXiv:2408.00118, section 2


def _vocab_size(model: "PreTrainedModel") -> int:
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def head_is_composable(model: "PreTrainedModel") -> bool:
    """Return whether head(decoder(ids)) is the model's own answer.

    Some models scale or shift their logits in ways of their own; those keep their own forward, with all its logits.
    Raises ModelError for a model that sees later tokens when it predicts earlier ones.
    """
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(model, model.base_model_prefix, None), nn.Module):
        return False
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).reshape(1, 8) % _vocab_size(model)
    answer = model(input_ids=ids, use_cache=False).logits
    tolerance = 1e-5 if answer.dtype == torch.float32 else 2e-2
    expected = answer.float()
    other = model(input_ids=ids.index_fill(1, torch.tensor([7], device=device), 9), use_cache=False).logits.float()
    composed = _cap(head(decoder_of(model)(input_ids=ids, use_cache=False)[0]).float(), _soft_cap(model))
    model.train(was_training)
    if not torch.allclose(expected[:, :7], other[:, :7], rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ModelError(
            f"{type(model).__name__} sees later tokens when it predicts earlier ones: it is not a causal language "
            "model, and would be trained to copy. Choose a decoder model."
        )
    return composed.shape == expected.shape and torch.allclose(composed, expected, rtol=1e-3, atol=1e-3)
