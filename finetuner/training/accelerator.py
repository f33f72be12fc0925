"""The one place where a Plan becomes an Accelerator."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from finetuner.errors import PlanError
from finetuner.plan import Plan
from finetuner.world import World

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(plan: Plan, world: World) -> Accelerator:
    """Raises PlanError if Accelerate did not set up the ranks that the launcher started."""
    accelerator = Accelerator(
        # Without it, Accelerate on a machine with no GPU runs every rank as a world of its own.
        cpu=world.device == "cpu",
        mixed_precision=_ACCELERATE_PRECISION[plan.precision],
        # Our groups are complete by construction; the end of a dataloader means nothing here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=plan.grad_accum, sync_with_dataloader=False),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # the others wait while the main rank writes and hashes a checkpoint: 84 GB for 7B parameters
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
    )
    expected = {DistributedType.NO} if world.size == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.num_processes != world.size or accelerator.distributed_type not in expected:
        raise PlanError(
            f"{world.size} ranks were started, but Accelerate runs {accelerator.num_processes} as "
            f"{accelerator.distributed_type.value}. Start with `accelerate launch` or `torchrun`, without a config of "
            "another engine (`accelerate launch --config_file ...`, `accelerate config`)."
        )
    return accelerator


def use_threads_and_matmuls(world: World, tf32: bool) -> None:
    """Settings of the process, made once before the model is built."""
    if world.device == "cpu":
        torch.set_num_threads(world.num_threads)
    if tf32:
        torch.set_float32_matmul_precision("high")
