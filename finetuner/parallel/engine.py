"""What the loop asks of an engine, and the plainest one: a copy of the model on each rank."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

from finetuner.parallel.optimizer_state import load_optimizer_tensors, optimizer_tensors, set_learning_rate

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Held:
    """What one rank holds between steps. `parameters` and `optimizer` count elements (the optimizer's: those that this
    rank updates), `num_bytes` those of the parameters and of the fp32 copies that an engine updates in their place."""

    parameters: int
    optimizer: int
    num_bytes: int


class Engine(Protocol):
    """Where a model's parts are, and how gradients and updates come about there.

    Every method but `held` is called by all ranks together. Gradients are averaged over the ranks and summed over the
    micro-batches of a step, in every engine.
    """

    name: str
    module: nn.Module  # what is called: batch in, summed loss out

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over what this rank updates."""

    def set_learning_rate(self, lr: float) -> None:
        """Before the first backward of a step."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` of its step."""

    def backward(self, loss: torch.Tensor) -> None: ...

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        """Clip the gradient to `max_norm` (0: never), step unless it is not finite, and forget the gradient.

        Returns its norm before clipping, over all ranks, and whether the weights were updated.
        """

    def held(self) -> Held: ...

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Parameters and buffers of the model, gathered from all ranks; on the CPU of rank 0, {} on the others.
        What is trained comes as it is updated: in fp32."""

    def optimizer_state(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        """ "parameter name::state name" -> whole tensor; on rank 0, {} on the others."""

    def load_optimizer_state(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what optimizer_state gave, in whatever engine on however many ranks."""


class CopiesEngine:
    """One rank, or DDP: every rank holds all."""

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> None:
        self.accelerator = accelerator
        self.module: nn.Module = accelerator.prepare(module)
        self.prepared: AcceleratedOptimizer = accelerator.prepare(make_optimizer())
        self.name = "one rank" if accelerator.num_processes == 1 else f"DDP over {accelerator.num_processes} ranks"
        copies = isinstance(self.module, nn.parallel.DistributedDataParallel)
        assert copies == (accelerator.distributed_type != DistributedType.NO), "Accelerate made another engine"

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.prepared.optimizer

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        with self.accelerator.accumulate(self.module):
            assert self.accelerator.sync_gradients == last, "the micro-batches of a step are grad_accum in number"
            yield

    def backward(self, loss: torch.Tensor) -> None:
        # Accelerate's own would divide by the accumulation steps, and look for a package on the disk each time.
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), max_norm or math.inf)
        assert norm is not None, "the last micro-batch of a group ends the accumulation"
        grad_norm = float(norm)
        finite = math.isfinite(grad_norm) and loss_is_finite
        if finite or self.accelerator.scaler is not None:  # the loss scaler of fp16 looks for overflow itself
            self.prepared.step()
            finite = finite and not self.prepared.step_was_skipped
        self.optimizer.zero_grad()
        return grad_norm, finite

    def held(self) -> Held:
        return held_by(self.module.parameters(), self.optimizer)

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        if not self.accelerator.is_main_process:
            return {}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def optimizer_state(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        return optimizer_tensors(self.optimizer, parameters) if self.accelerator.is_main_process else {}

    def load_optimizer_state(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, parameters, tensors)


def local_part(tensor: Any) -> torch.Tensor:
    """What this rank holds of a tensor, which may be torch's DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held_by(parameters: Any, optimizer: torch.optim.Optimizer) -> Held:
    """Of parameters that an optimizer updates in place."""
    local = [local_part(p) for p in parameters]
    updated = sum(local_part(p).numel() for group in optimizer.param_groups for p in group["params"])
    return Held(sum(p.numel() for p in local), updated, sum(p.numel() * p.element_size() for p in local))
