"""Next token: the negative log-likelihood of every trained token, with what training adds to it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (its usual name)

from finetuner.data.batches import Batch, BatchTensors
from finetuner.models.neftune import embedding_noise
from finetuner.objectives.base import Figure, Term
from finetuner.recipe.sections import RegularizationSection

if TYPE_CHECKING:
    from finetuner.objectives.loss_module import LossModule


@dataclass(frozen=True)
class Regularization:
    """Additions to the loss that training has and evaluation does not.

    `label_smoothing` e: (1 - e) (-log p(target)) + e mean(-log p) (arXiv:1512.00567). `z_loss` c: c log(Z)^2, Z being
    the sum of exp(logits) (arXiv:2204.02311, section 5). `noise_alpha`: see models/neftune.py.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    noise_alpha: float = 0.0


NONE = Regularization()


@dataclass(frozen=True)
class NextToken:
    """K = 1: the cross entropy of trained tokens, over their number."""

    regularization: Regularization = NONE

    terms: ClassVar[tuple[Term, ...]] = (Term("next token", "trained tokens"),)
    figures: ClassVar[tuple[Figure, ...]] = ()
    text_term: ClassVar[int | None] = 0

    @classmethod
    def from_section(cls, section: RegularizationSection) -> "NextToken":
        return cls(
            Regularization(
                label_smoothing=section.label_smoothing_factor,
                z_loss=section.z_loss_coefficient,
                noise_alpha=section.neftune_noise_alpha or 0.0,
            )
        )

    def counts(self, batch: Batch) -> tuple[int]:
        """Return (trained tokens,) of a micro-batch."""
        return (batch.num_trained,)

    def sums(self, module: "LossModule", batch: BatchTensors) -> torch.Tensor:
        """Return (1,): the sum of -log p(target) over the trained tokens, in fp32, and in training its additions."""
        added = self.regularization if module.training else NONE
        targets = batch["targets"]
        assert targets is not None
        noise: AbstractContextManager[None] = nullcontext()
        if added.noise_alpha:
            embedding = module.unwrapped.get_input_embeddings()
            noise = embedding_noise(embedding, added.noise_alpha, batch["attention_mask"], batch["position_ids"])
        with noise:
            return module.sum_over_logits(batch, lambda logits, where: summed_loss(logits, targets[where], added))


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, added: Regularization) -> torch.Tensor:
    """Return (1,): the summed cross entropy of fp32 logits (trained, vocabulary) and targets (trained,), with what is
    added to it."""
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=added.label_smoothing)
    if added.z_loss:
        loss = loss + added.z_loss * logits.logsumexp(dim=-1).square().sum()
    return torch.stack([loss])  # not a view: FSDP2 hooks what its root module returns
