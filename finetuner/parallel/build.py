"""A loss module and a layout over ranks -> the engine that carries it out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from finetuner.models.lazy_weights import LazyWeights
from finetuner.objectives.loss_module import LossModule
from finetuner.parallel.engine import Engine
from finetuner.parallel.fsdp import FsdpEngine, shard_module
from finetuner.parallel.replicated import ReplicatedEngine
from finetuner.parallel.zero import ZeroEngine
from finetuner.plan.parallel import EngineName, ParallelPlan

MakeOptimizer = Callable[[torch.device], torch.optim.Optimizer]


def build_engine(
    accelerator: Accelerator,
    loss: LossModule,
    plan: ParallelPlan,
    *,
    full: bool,
    make_optimizer: MakeOptimizer,
    lazy: LazyWeights | None = None,
) -> Engine:
    """Lay `loss` over the ranks, in place, and read its lazy weights. Each engine asserts that it is the one asked for.

    `full`: the model is trained itself, and not an adapter on a frozen one. `make_optimizer` is called when the
    parameters are what they will be, with the device on which they are updated.
    """
    return BUILDERS[plan.engine](_EngineParts(accelerator, loss, plan, full, make_optimizer, lazy))


@dataclass(frozen=True)
class _EngineParts:
    """The arguments of build_engine."""

    accelerator: Accelerator
    loss: LossModule
    plan: ParallelPlan
    full: bool
    make_optimizer: MakeOptimizer
    lazy: LazyWeights | None

    def optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(torch.device("cpu") if self.plan.offloads_optimizer else self.accelerator.device)


def _replicated(parts: _EngineParts) -> Engine:
    assert parts.lazy is None, "what every rank has in full is read before"
    return ReplicatedEngine(parts.accelerator, parts.loss.to(parts.accelerator.device), parts.optimizer)


def _fsdp2(parts: _EngineParts) -> Engine:
    shard_module(parts.loss, parts.plan, parts.accelerator.device, full=parts.full, lazy=parts.lazy)
    return FsdpEngine(parts.accelerator, parts.loss, parts.optimizer(), parts.plan)


def _zero(parts: _EngineParts) -> Engine:
    return ZeroEngine(parts.accelerator, parts.loss, parts.optimizer(), parts.plan, parts.lazy)


BUILDERS: dict[EngineName, Callable[[_EngineParts], Engine]] = {
    "replicated": _replicated,
    "fsdp2": _fsdp2,
    "zero": _zero,
}
