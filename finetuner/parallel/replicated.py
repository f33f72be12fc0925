"""The engine without sharding: a full copy of the model on each rank, alone or under DDP."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

from finetuner.objectives.loss_module import Question
from finetuner.parallel.engine import EngineRequest, RankMemory, Tensors, memory_of
from finetuner.parallel.gradient_norm import clip_factor, scale_, sum_of_squares
from finetuner.parallel.optimizer_state import load_optimizer_tensors, optimizer_tensors, set_learning_rate


def build(request: EngineRequest) -> "ReplicatedEngine":
    """Return the engine of a full copy on each rank."""
    assert request.lazy is None, "what every rank has in full is read before"
    return ReplicatedEngine(request.accelerator, request.loss.to(request.accelerator.device), request.optimizer)


class ReplicatedEngine:
    """One rank, or DDP: every rank holds everything."""

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> None:
        self.accelerator = accelerator
        self.module: nn.Module = accelerator.prepare(module)
        self.prepared: AcceleratedOptimizer = accelerator.prepare(make_optimizer())
        self.name = "one rank" if accelerator.num_processes == 1 else f"DDP over {accelerator.num_processes} ranks"
        is_ddp = isinstance(self.module, nn.parallel.DistributedDataParallel)
        assert is_ddp == (accelerator.distributed_type != DistributedType.NO), "Accelerate made another engine"

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.prepared.optimizer

    @torch.no_grad()
    def ask(self, question: Question) -> float:
        return float(self.module(question=question))

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
        self.accelerator.unscale_gradients(self.prepared)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = math.sqrt(float(sum_of_squares(gradients, self.accelerator.device)))
        scale_(gradients, clip_factor(norm, max_norm))
        finite = math.isfinite(norm) and loss_is_finite
        if finite or self.accelerator.scaler is not None:  # the loss scaler of fp16 looks for overflow itself
            self.prepared.step()
            finite = finite and not self.prepared.step_was_skipped
        self.optimizer.zero_grad()
        return norm, finite

    def memory(self) -> RankMemory:
        return memory_of(self.module.parameters(), self.optimizer)

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        if not self.accelerator.is_main_process:
            return {}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def gather_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        return optimizer_tensors(self.optimizer, parameters) if self.accelerator.is_main_process else {}

    def load_optimizer(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, parameters, tensors)
