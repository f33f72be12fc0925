"""The one place where a Plan becomes an Accelerator and an engine.

Accelerate sets up the ranks, the device, the precision, and DDP. FSDP2 and ZeRO are built on its ranks directly: see
fsdp.py and zero.py for why.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import distributed

from finetuner.errors import FinetunerError, PlanError
from finetuner.models.lazy_weights import LazyWeights
from finetuner.objectives.next_token import TokenLoss
from finetuner.parallel.engine import CopiesEngine, Engine
from finetuner.plan.parallel import FsdpPlan, ZeroPlan
from finetuner.plan.run import Plan
from finetuner.world import World, take_engine_from_launcher

T = TypeVar("T")

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(plan: Plan, world: World, timeout_seconds: float) -> Accelerator:
    """Raises PlanError if the ranks cannot meet, or Accelerate did not set up those that the launcher started."""
    take_engine_from_launcher()
    try:
        accelerator = _join_ranks(plan, world, timedelta(seconds=timeout_seconds))
    except distributed.DistNetworkError as error:
        first = str(error).splitlines()[0]
        raise PlanError(
            f"the ranks cannot meet: {first}\nIf the port is taken, name another one: accelerate launch "
            "--main_process_port 29501 ..., torchrun --master_port 29501 ... (or --standalone on one machine)."
        ) from error
    except distributed.DistStoreError as error:
        raise PlanError(
            f"{world.size} ranks were to meet and did not all come: {str(error).splitlines()[0]}\n"
            "Look at the output of the other nodes, and at the firewall between them."
        ) from error
    expected = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}  # also of one rank, if torchrun started it
    if world.size == 1:
        expected.add(DistributedType.NO)
    if accelerator.num_processes != world.size or accelerator.distributed_type not in expected:
        raise PlanError(
            f"{world.size} ranks were started, but Accelerate runs {accelerator.num_processes} as "
            f"{accelerator.distributed_type.value}. Start with `accelerate launch` or `torchrun`, without a config of "
            "another engine (`accelerate launch --config_file ...`, `accelerate config`)."
        )
    if plan.engine is not None and not distributed.is_initialized():
        # One process, started by no launcher: a group of one, so that a sharded recipe means the same there.
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    return accelerator


def _join_ranks(plan: Plan, world: World, timeout: timedelta) -> Accelerator:
    return Accelerator(
        # Without it, Accelerate on a machine with no GPU runs every rank as a world of its own.
        cpu=world.device == "cpu",
        mixed_precision=_ACCELERATE_PRECISION[plan.precision],
        # Our groups are complete by construction; the end of a dataloader means nothing here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=plan.grad_accum, sync_with_dataloader=False),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )


def build_engine(
    accelerator: Accelerator,
    loss: TokenLoss,
    plan: Plan,
    *,
    full: bool,
    make_optimizer: Callable[[torch.device], torch.optim.Optimizer],
    promises: LazyWeights | None = None,
) -> Engine:
    """Spread `loss` as the plan says, in place, and read what is promised of it. `make_optimizer` is called when its
    parameters are what they will be, with the device on which they will be updated.

    Each engine asserts that it is the one that was asked for.
    """
    offloads = plan.engine is not None and plan.engine.offload
    updated_on = torch.device("cpu") if offloads else accelerator.device
    if isinstance(plan.engine, FsdpPlan):
        from finetuner.parallel.fsdp import FsdpEngine, shard_module

        shard_module(loss, plan.engine, accelerator.device, full=full, promises=promises)
        return FsdpEngine(accelerator, loss, make_optimizer(updated_on), plan.engine)
    if isinstance(plan.engine, ZeroPlan):
        from finetuner.parallel.zero import ZeroEngine

        return ZeroEngine(accelerator, loss, make_optimizer(updated_on), plan.engine, promises)
    assert promises is None
    return CopiesEngine(accelerator, loss.to(accelerator.device), lambda: make_optimizer(updated_on))


def by_main_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives on the main rank, on every rank; called by all together.

    A FinetunerError of it is raised on all, so that none waits for a rank that has left; the main one prints it.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except FinetunerError as error:
            broadcast_object_list([None, error])
            _leave_group()
            raise
    result, refusal = broadcast_object_list(outcome)
    if refusal is not None:
        refusal.said = True
        _leave_group()
        raise refusal
    return result


def leave_ranks(accelerator: Accelerator) -> None:
    """At the end of a run, well or ill: a group of one that build_accelerator made would meet the next run."""
    accelerator.end_training()
    _leave_group()


def _leave_group() -> None:
    """A process that ends with its group's threads running may abort instead of giving its exit code."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def use_threads_and_matmuls(world: World, tf32: bool) -> None:
    """Settings of the process, made once before the model is built."""
    if world.device == "cpu":
        torch.set_num_threads(world.num_threads)
    if tf32:
        torch.set_float32_matmul_precision("high")
