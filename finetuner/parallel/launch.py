"""Process groups: their start, decisions that all ranks share, and their end.

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
    gather_object,
)
from torch import distributed

from finetuner.errors import FinetunerError, PlanError
from finetuner.plan.run import Plan
from finetuner.world import World, take_engine_from_launcher

T = TypeVar("T")

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(plan: Plan, world: World, timeout_seconds: float) -> Accelerator:
    """Return the Accelerator of this rank, joined with the others.

    Raises PlanError if the ranks cannot meet, or Accelerate did not set up those that the launcher started.
    """
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
    if not plan.parallel.is_replicated and not distributed.is_initialized():
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


def by_main_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return, on every rank, what `work` gives on the main rank. Called by all ranks together.

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


def by_every_rank(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work`, in which no rank waits for another, on every rank. Called by all ranks together.

    A FinetunerError of one rank is raised on all; the main one prints it.
    """
    error = None
    try:
        work()
    except FinetunerError as raised:
        error = raised
    failures = [raised for raised in gather_object([error]) if raised is not None]
    if failures:
        failures[0].said = not accelerator.is_main_process
        _leave_group()
        raise failures[0] from error


def leave_ranks(accelerator: Accelerator) -> None:
    """End the process group of a run: a group of one that build_accelerator made would meet the next run."""
    accelerator.end_training()
    _leave_group()


def _leave_group() -> None:
    """Destroy the process group: a process that ends with its threads running may abort, and lose its exit code."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def use_threads_and_matmuls(world: World, tf32: bool) -> None:
    """Set the process's CPU threads and its fp32 matrix products, once before the model is built."""
    if world.device == "cpu":
        torch.set_num_threads(world.num_threads)
    if tf32:
        torch.set_float32_matmul_precision("high")
