"""The contract of an engine: where a model's shards are, and how gradients and updates come about there."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from finetuner.models.lazy_weights import LazyWeights
from finetuner.objectives.loss_module import LossModule, Question
from finetuner.plan.parallel import ParallelPlan

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RankMemory:
    """Elements and bytes that one rank holds between steps.

    `num_parameters`: elements of the model's parameters; `num_updated`: elements that this rank's optimizer updates;
    `num_bytes`: bytes of the parameters, and of the fp32 copies that an engine updates in their place.
    """

    num_parameters: int
    num_updated: int
    num_bytes: int


@dataclass(frozen=True)
class EngineRequest:
    """Arguments of an engine's `build`, in parallel/<engine>.py.

    `full`: the model is trained itself, and not an adapter on a frozen one. `make_optimizer` is called when the
    parameters are what they will be, with the device on which they are updated. `lazy`: weights that are still to be
    read; None: all are there.
    """

    accelerator: Accelerator
    loss: LossModule
    plan: ParallelPlan
    full: bool
    make_optimizer: Callable[[torch.device], torch.optim.Optimizer]
    lazy: LazyWeights | None = None

    def optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer where the plan updates: on the CPU if it is offloaded."""
        return self.make_optimizer(torch.device("cpu") if self.plan.offloads_optimizer else self.accelerator.device)


class Engine(Protocol):
    """A module laid over the ranks, with an optimizer over what each of them updates.

    Every method but `memory` is called by all ranks together. Gradients are averaged over the ranks and summed over the
    micro-batches of a step, in every engine.
    """

    name: str
    module: nn.Module  # is called with a batch's tensors, and gives (K + F,) sums: see LossModule.forward

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over what this rank updates."""

    def ask(self, question: Question) -> float:
        """Call `question` on the module while its full weights are gathered, and return the number it gives."""

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next update. Called before the first backward of its step."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch's forward and backward; `last` of its step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` (scalar)."""

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        """Clip the gradient to `max_norm` (0: never), step unless it is not finite, and clear the gradient.

        Returns its norm before clipping, over all ranks, and whether the weights were updated.
        """

    def memory(self) -> RankMemory:
        """Return what this rank holds between steps."""

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Return full parameters and buffers (any shapes) from the shards of all ranks.

        They are on the CPU of rank 0; the other ranks get {}. What is trained comes as it is updated: in fp32.
        """

    def gather_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        """Return "parameter name::state name" -> full tensor, shaped as the parameter or a scalar, on rank 0; {} on
        the others."""

    def load_optimizer(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore full tensors (shapes as gather_optimizer gave them), in any engine on any number of ranks."""


def local_shard(tensor: Any) -> torch.Tensor:
    """Return this rank's shard of a tensor, which may be torch's DTensor; any shape."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def memory_of(parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> RankMemory:
    """Return what a rank holds of parameters (any shapes) that an optimizer updates in place."""
    local = [local_shard(p) for p in parameters]
    updated = sum(local_shard(p).numel() for group in optimizer.param_groups for p in group["params"])
    return RankMemory(sum(p.numel() for p in local), updated, sum(p.numel() * p.element_size() for p in local))
