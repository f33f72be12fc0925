"""The norm of a gradient: one function for every engine, exact to fp64.

torch's fp32 norm of 6.3 million elements is 3.5e-4 too small on one CPU thread, and differs with how a tensor is cut.
Engines that shard differently would report, and clip by, different norms of one gradient.
"""

import math
from collections.abc import Iterable

import torch

# Elements that are cast to fp64 at a time: on a CPU they stay in its cache, on a GPU 128 MiB are passed through.
_CPU_PIECE, _GPU_PIECE = 1 << 16, 1 << 24


@torch.no_grad()
def sum_of_squares(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the sum of squares of all elements of `tensors` (any shapes), a scalar on `device` in fp64.

    On MPS, which has no fp64: in fp32, from pieces small enough that fp32 rounds nothing away.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=device)
    for tensor in tensors:
        piece_size = _CPU_PIECE if tensor.device.type in ("cpu", "mps") else _GPU_PIECE
        norms = [torch.linalg.vector_norm(piece, dtype=wide) for piece in tensor.detach().reshape(-1).split(piece_size)]
        if norms:
            total += torch.stack(norms).square().sum().to(device)
    return total


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what a gradient of this norm is multiplied by, as torch.nn.utils.clip_grad_norm_ has it.

    1.0 if `max_norm` is 0 (never clip), the norm is below it, or it is not finite.
    """
    if not max_norm or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))


@torch.no_grad()
def scale_(tensors: Iterable[torch.Tensor], factor: float) -> None:
    """Multiply tensors (any shapes) by a factor, in place."""
    if factor != 1.0:
        for tensor in tensors:
            tensor.mul_(factor)
