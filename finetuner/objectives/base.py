"""The contract of an objective, which says what a run minimizes.

From each micro-batch an objective gives K sums S_k and, from the batch alone, K counts. The loop minimizes

    loss = sum_k w_k S_k / N_k        N_k: the counts, summed over all ranks and micro-batches of the step

so that neither the loss nor its gradient depends on how a global batch is split. Figures are further sums, detached,
divided by the N_k of the term they belong to: means that are exact over ranks too. The loop knows no other loss.

    next token        K = 1: trained tokens
    ORPO, CPO         K = 2: chosen tokens; pairs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from finetuner.data.batches import Batch, BatchTensors

if TYPE_CHECKING:
    from finetuner.objectives.loss_module import LossModule


@dataclass(frozen=True)
class Term:
    """One addend of the loss, `weight` x sum / count. `unit`: what the count counts, such as "trained tokens"."""

    name: str
    unit: str
    weight: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A mean to log under `name`: a further sum, divided by the count of the term of that index."""

    name: str
    term: int = 0


class Objective(Protocol):
    """The contract of an objective. Implementations are frozen values."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """The K addends of the loss, in the order of `sums` and `counts`."""

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The F means that are logged beside the loss."""

    @property
    def text_term(self) -> int | None:
        """Index of the term that is a negative log-likelihood in nats over tokens of text, from which perplexity and
        bits per byte are read; None if there is none."""

    def counts(self, batch: Batch) -> Sequence[int]:
        """Return the K counts of one micro-batch, which are known without the model."""

    def sums(self, module: "LossModule", batch: BatchTensors) -> torch.Tensor:
        """Return (K + F,) sums of one micro-batch in fp32: the terms, then the figures, detached.

        With nothing to count the sums are 0 and still connected to every parameter, as DDP needs.
        """


def step_loss(objective: Objective, sums: Sequence[float], counts: Sequence[int]) -> float:
    """Return sum_k w_k S_k / N_k from the sums and counts of a whole step. A term that counts nothing adds nothing."""
    terms = zip(objective.terms, sums, counts, strict=False)
    return sum(term.weight * total / count for term, total, count in terms if count)


def figure_means(objective: Objective, sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Return name -> mean of each figure. `sums`: (K + F,) of a whole step; `counts`: (K,)."""
    totals = sums[len(objective.terms) :]
    pairs = zip(objective.figures, totals, strict=True)
    return {figure.name: total / counts[figure.term] for figure, total in pairs if counts[figure.term]}


def gradient_scales(objective: Objective, counts: Sequence[int], data_parallel: int) -> list[float]:
    """Return (K,) factors of the sums whose backward gives the gradient of the step's loss.

    Engines average gradients over `data_parallel` ranks; the factors undo that.
    """
    pairs = zip(objective.terms, counts, strict=True)
    return [term.weight * data_parallel / count if count else 0.0 for term, count in pairs]
