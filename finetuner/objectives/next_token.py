"""From hidden states to the summed loss, without (tokens x vocabulary) logits in memory.

The head is composed around the decoder, not patched into it: `TokenLoss` calls the decoder, keeps the positions that
are trained on, and takes the cross entropy of the head's logits in chunks that are recomputed in backward.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.checkpoint import checkpoint

from finetuner.errors import ModelError
from finetuner.models.neftune import embedding_noise

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# fp32 logits of one chunk. Larger chunks are no faster; smaller ones launch more kernels.
CHUNK_BYTES = 2**28


Question = Callable[["PreTrainedModel"], float]


@dataclass(frozen=True)
class Regularisers:
    """What training adds to the loss, and evaluation does not.

    `label_smoothing` e: (1 - e) (-log p(target)) + e mean(-log p) (arXiv:1512.00567). `z_loss` c: c log(Z)^2, Z being
    the sum of exp(logits) (arXiv:2204.02311, section 5). `noise_alpha`: see noise.py.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    noise_alpha: float = 0.0


class TokenLoss(nn.Module):
    """The outermost module: batch in, sum of the trained tokens' losses out.

    Being the only module that DDP or FSDP wraps, it is where they gather what its forward uses, the head included.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        *,
        composed: bool = False,
        regularisers: Regularisers | None = None,
    ) -> None:
        """`composed`: what head_is_composable says of the model; not before it has its weights."""
        super().__init__()
        self.model = model
        self.composed = composed
        self.regularisers = regularisers or Regularisers()

    @property
    def bare(self) -> "PreTrainedModel":
        """The model without PEFT's wrapper."""
        return _bare(self.model)

    def forward(
        self,
        input_ids: "torch.Tensor | Question",
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over the trained tokens of -log p(target), in fp32.

        With a question in the place of a batch: its answer, asked where an engine has gathered what the model needs.

        input_ids, attention_mask: (rows, length), padded on the right. positions, targets: (trained,), see Batch.
        position_ids: (rows, length) instead of the mask, where a row holds several documents.
        With no trained token the result is 0 and still connected to every parameter, as DDP needs.
        """
        model = self.bare
        if callable(input_ids) and not isinstance(input_ids, torch.Tensor):
            return torch.tensor(float(input_ids(model)))
        assert positions is not None and targets is not None
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:  # some models have no such argument
            inputs["position_ids"] = position_ids
        added = self.regularisers if self.training else Regularisers()
        noise: AbstractContextManager[None] = nullcontext()
        if added.noise_alpha:
            noise = embedding_noise(model.get_input_embeddings(), added.noise_alpha, attention_mask, position_ids)
        with noise:
            if not self.composed:
                logits = model(**inputs).logits
                return summed_loss(logits.flatten(0, 1)[positions].float(), targets, added)
            hidden = decoder_of(model)(**inputs)[0]
        hidden = hidden.flatten(0, 1)[positions]
        head = model.get_output_embeddings()
        soft_cap = _soft_cap(model)
        rows_per_chunk = max(1, CHUNK_BYTES // (4 * _vocab_size(model)))
        if len(targets) <= rows_per_chunk:
            return _chunk_loss(head, hidden, targets, soft_cap, added)
        losses = [
            checkpoint(_chunk_loss, head, h, t, soft_cap, added, use_reentrant=False)
            for h, t in zip(hidden.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
        ]
        return torch.stack(losses).sum()


def _chunk_loss(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, soft_cap: float | None, added: Regularisers
) -> torch.Tensor:
    return summed_loss(_cap(head(hidden).float(), soft_cap), targets, added)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, added: Regularisers) -> torch.Tensor:
    """Cross entropy of fp32 `logits` (trained, vocabulary), summed, and what is added to it."""
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=added.label_smoothing)
    return loss + added.z_loss * logits.logsumexp(dim=-1).square().sum() if added.z_loss else loss


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """The model without its head: token ids in, hidden states (rows, length, width) out."""
    return getattr(model, model.base_model_prefix)


def _bare(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    from peft import PeftModel

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def _soft_cap(model: "PreTrainedModel") -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def _cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap  # Gemma 2, arXiv:2408.00118, section 2


def _vocab_size(model: "PreTrainedModel") -> int:
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def head_is_composable(model: "PreTrainedModel") -> bool:
    """Whether head(decoder(ids)) is what the model itself answers. Some models scale or shift their logits in ways of
    their own; those keep their own forward, with all its logits."""
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
