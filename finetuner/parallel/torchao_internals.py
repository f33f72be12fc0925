"""The moments of torchao's AdamW as named tensors. They are tensors of its own kinds, of 8 or 4 bits in blocks that
share a scale, and its optimizers say nothing of how to store them.

Names and forms: pytorch/ao, torchao/optim (0.18). Under FSDP2 a moment is in blocks of each rank's shard.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # -> whether it has a sign
_INNER = ("codes", "scale")  # `qmap`, the table of values, is a constant of the kind


def is_torchao(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer keeps moments of torchao's kinds; the same on every rank."""
    return type(optimizer).__module__.startswith("torchao.")


def inner_tensors(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a local state (any shape) is made of: {"": itself} of an ordinary tensor."""
    if isinstance(value, torch.Tensor) and all(hasattr(value, name) for name in _INNER):
        return {f".{name}": getattr(value, name) for name in _INNER}
    return {"": value}


def local_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return "state name" -> tensor (any shapes) of this rank's shard of a parameter; {} before the first step."""
    found: dict[str, torch.Tensor] = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        local = value.to_local() if hasattr(value, "to_local") else value
        found |= {key + part: inner.detach() for part, inner in inner_tensors(local).items()}
    return found


@torch.no_grad()
def load_local_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, stored: Mapping[str, torch.Tensor]
) -> None:
    """Give this rank's shard of a parameter the state that local_state returned, shape by shape.

    Raises ValueError for a state of another shard, whose blocks lie elsewhere.
    """
    maker: Any = optimizer
    state: dict[str, torch.Tensor] = {"step": stored["step"].clone().cpu()}
    for key, has_sign in _MOMENTS.items():
        state[key] = maker._new_buffer(parameter, has_sign)
        buffer: Any = state[key]
        local = buffer.to_local() if hasattr(buffer, "to_local") else buffer
        parts = inner_tensors(local)
        if any(key + part not in stored or stored[key + part].shape != inner.shape for part, inner in parts.items()):
            raise ValueError(f"the stored {key} is of another shard than {tuple(local.shape)}")
        for part, inner in parts.items():
            inner.copy_(stored[key + part])
    optimizer.state[parameter] = state
