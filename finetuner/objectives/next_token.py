"""Next token: the negative log-likelihood of every trained token, with what training changes about it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch.nn import functional as F  # noqa: N812  (its usual name)

from finetuner.data.batches import Batch, BatchTensors
from finetuner.models.neftune import embedding_noise
from finetuner.objectives.base import Figure, Term
from finetuner.recipe.sections import RegularizationSection

if TYPE_CHECKING:
    from finetuner.objectives.loss_module import LossModule


@dataclass(frozen=True)
class Weighting:
    """The weight of each token's loss, through which no gradient flows.

    by "probability": p(target)^exponent; exponent 1 is DFT (arXiv:2508.05629). by "entropy": (H / unit)^exponent, H
    being the entropy in nats of the `top_k` likeliest tokens among themselves (EAFT).
    """

    by: Literal["probability", "entropy"]
    exponent: float = 1.0
    top_k: int = 20
    unit: float = 3.0

    @torch.no_grad()
    def of(self, logits: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Return (trained,) weights from fp32 logits (trained, vocabulary) and -log p(target) (trained,)."""
        if self.by == "probability":
            return losses.mul(-self.exponent).exp()
        log_p = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values.log_softmax(dim=-1)
        return log_p.exp().mul(log_p).sum(dim=-1).neg().div(self.unit).clamp(min=0.0).pow(self.exponent)


@dataclass(frozen=True)
class Regularization:
    """Changes of the loss that training has and evaluation does not.

    `label_smoothing` e: (1 - e) (-log p(target)) + e mean(-log p) (arXiv:1512.00567). `z_loss` c: c log(Z)^2, Z being
    the sum of exp(logits) (arXiv:2204.02311, section 5). `noise_alpha`: see models/neftune.py. `weighting`: of the
    cross entropy alone, whose sum is still divided by the number of trained tokens.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    noise_alpha: float = 0.0
    weighting: Weighting | None = None


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
                weighting=_weighting(section),
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
    if added.weighting is None:
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=added.label_smoothing)
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * added.weighting.of(logits, losses)).sum()
    if added.z_loss:
        loss = loss + added.z_loss * logits.logsumexp(dim=-1).square().sum()
    return torch.stack([loss])  # not a view: FSDP2 hooks what its root module returns


def _weighting(section: RegularizationSection) -> Weighting | None:
    by = section.loss_weighting
    if by is None:
        return None
    return Weighting(
        by, section.loss_weighting_exponent, section.loss_weighting_top_k, section.loss_weighting_entropy_unit
    )
