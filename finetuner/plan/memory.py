"""What is kept between steps, in bytes: arithmetic alone.

For a weight that is trained: itself in fp32 (under ZeRO with bf16 a bf16 copy beside it), its gradient in fp32, and
the state of its optimizer (of AdamW: two moments in fp32, or in 8 bits). For one that is not: itself as it is kept.
"""

from dataclasses import dataclass

from finetuner.plan.parallel import ParallelPlan

# Of a weight, on its device, at the least: an optimizer that is not named here counts as having none.
_STATE_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2}


@dataclass(frozen=True)
class Parts:
    """Bytes of a whole model and of what trains it."""

    weights: int
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Kept:
    """Bytes that one rank keeps, on its device and in its node's memory."""

    device: int
    host: int


def trained_parts(count: int, *, parallel: ParallelPlan, bf16: bool, optimizer: str) -> Parts:
    """Of `count` weights that are all trained."""
    in_copies = parallel.casts_full_model and bf16
    state = _STATE_BYTES.get(optimizer, 0)
    return Parts((2 if in_copies else 4) * count, 4 * count, (state + 4 * in_copies) * count)


def kept_by_a_rank(parts: Parts, parallel: ParallelPlan) -> Kept:
    """As each engine spreads weights, gradients and optimizer; what is offloaded is in the node's memory."""
    weights = parts.weights // (parallel.shard if parallel.shards_weights else 1)
    gradients = parts.gradients // (parallel.shard if parallel.shards_gradients else 1)
    optimizer = parts.optimizer // (parallel.shard if parallel.shards_optimizer else 1)
    if parallel.offloads_weights:
        return Kept(0, weights + gradients + optimizer)
    if parallel.offloads_optimizer:  # at the least the optimizer; which of the others, DeepSpeed's configuration says
        return Kept(0, optimizer)
    return Kept(weights + gradients + optimizer, 0)
