"""Bytes that a run has in memory from one step to the next, by arithmetic alone. Activations come on top.

A trained weight takes 4 bytes in fp32 (under ZeRO with bf16 a bf16 copy too), 4 for its gradient, and the state of its
optimizer (recipe/optimizers.py; of AdamW, 8 for two moments). A frozen weight takes what its number format takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from finetuner.plan.parallel import ParallelPlan
from finetuner.recipe.optimizers import FLOAT_BYTES, OPTIMIZERS, TrainedTensor, read_arguments
from finetuner.recipe.sections import OptimizerSection


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a full model, of its gradients and of its optimizer's state, over all ranks that share one copy."""

    weights: int
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank has on its device, and in its node's memory (`host`)."""

    device: int
    host: int


def bytes_of_training(
    tensors: Iterable[TrainedTensor], section: OptimizerSection, *, parallel: ParallelPlan, bf16: bool
) -> ModelBytes:
    """Bytes of a model that is made of `tensors`, all of them trained."""
    tensors = list(tensors)
    count = sum(tensor.num_elements for tensor in tensors)
    row, arguments = OPTIMIZERS[section.optimizer], read_arguments(section.optim_args)
    if not parallel.casts_full_model:
        state = sum(row.state_bytes(tensor, arguments) for tensor in tensors)
        return ModelBytes(FLOAT_BYTES * count, FLOAT_BYTES * count, state)
    state = row.state_bytes(TrainedTensor((count,)), arguments)  # ZeRO lays all tensors into flat ones
    if bf16:  # the optimizer updates fp32 weights of its own, and the model computes with their bf16 copy
        return ModelBytes(2 * count, FLOAT_BYTES * count, state + FLOAT_BYTES * count)
    return ModelBytes(FLOAT_BYTES * count, FLOAT_BYTES * count, state)


def without_paged_state(model: ModelBytes, section: OptimizerSection, device: str) -> ModelBytes:
    """Bytes that must find room on the device: a paged optimizer's state is not among them on a GPU ("cuda").

    The driver moves it to the node's memory where the GPU is short, so that it can be the reason to refuse neither.
    """
    paged = OPTIMIZERS[section.optimizer].is_paged and device == "cuda"
    return replace(model, optimizer=0) if paged else model


def bytes_of_a_rank(model: ModelBytes, parallel: ParallelPlan) -> RankBytes:
    """Bytes of one rank, as the layout shards weights, gradients and optimizer; offloaded ones are on the host."""
    weights = model.weights // (parallel.shard if parallel.shards_weights else 1)
    gradients = model.gradients // (parallel.shard if parallel.shards_gradients else 1)
    optimizer = model.optimizer // (parallel.shard if parallel.shards_optimizer else 1)
    if parallel.offloads_weights:
        return RankBytes(0, weights + gradients + optimizer)
    if parallel.offloads_optimizer:  # at the least the optimizer; which of the others, DeepSpeed's configuration says
        return RankBytes(0, optimizer)
    return RankBytes(weights + gradients + optimizer, 0)
