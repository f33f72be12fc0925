"""The trained parameters of a model: chosen, cast to fp32, and counted."""

import re

from torch import nn

from finetuner.errors import ModelError
from finetuner.models.four_bit_linear import FourBitLinear


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that is trained. A tied tensor appears once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_only(model: nn.Module, patterns: tuple[str, ...] | None) -> None:
    """Freeze every parameter whose name no pattern matches from its start; None freezes nothing.

    Raises ModelError for an expression that no name matches.
    """
    if patterns is None:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.match(pattern, name) for name in names):
            raise ModelError(
                f"unfrozen_parameters has '{pattern}', but no parameter's name begins like that.\n"
                f"They look like: {', '.join(names[:3])}, ..., {names[-1]}. (A tied head has no name of its own.)"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))


def train_in_fp32(model: nn.Module) -> None:
    """Cast the trained parameters to fp32, in place.

    A step of AdamW at a small rate is below half a bf16 ulp of most weights: they would not move at all.
    """
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of (trained, all) weights.

    Tied tensors count once, and a 4-bit layer by the weights that it stands for, not by its bytes.
    """
    parameters = list(model.parameters())
    layers = [m for m in model.modules() if isinstance(m, FourBitLinear)]
    unpacked = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers)
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + unpacked
