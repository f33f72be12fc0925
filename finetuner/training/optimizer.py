"""Parameters -> optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetuner.errors import PlanError
from finetuner.recipe.optimizers import read_arguments
from finetuner.recipe.sections import OptimizerSection
from finetuner.training.optimizer_state import SideBySide

Groups = list[dict[str, Any]]


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    section: OptimizerSection,
    *,
    device: torch.device,
    vocabulary: frozenset[str] = frozenset(),
) -> torch.optim.Optimizer:
    """The optimizer of the recipe's name over groups of parameters: matrices, which decay, and vectors (norms, biases),
    which do not.

    The learning rate is set by the loop before each step. `device`: where the update is computed. `vocabulary`: names
    of the parameters with a row for each token.
    """
    name, arguments = section.optimizer, read_arguments(section.optim_args)
    if name == "muon":
        return _muon(parameters, section, arguments, vocabulary)
    groups = parameter_groups(parameters, section)
    betas = {"betas": (section.adam_beta1, section.adam_beta2)}
    if name in ("adamw_torch", "adamw_torch_fused"):
        return _adamw(groups, section, arguments)
    if "adamw" in name:
        return _of_bitsandbytes("AdamW", groups, section, device, betas | {"eps": section.adam_epsilon} | arguments)
    if "lion" in name:
        return _of_bitsandbytes("Lion", groups, section, device, betas | arguments)
    if name == "adafactor":
        # transformers', not torch's, which scales the rate by the size of each parameter whatever it is told: the rates
        # of people's recipes are for this one, and for these two settings, which are those of transformers' Trainer.
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=0.0, **{"scale_parameter": False, "relative_step": False} | arguments)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=0.0, eps=section.adam_epsilon, **arguments)
    if name == "adagrad":
        return torch.optim.Adagrad(groups, lr=0.0, eps=section.adam_epsilon, **arguments)
    assert name == "sgd"
    return torch.optim.SGD(groups, lr=0.0, **arguments)


def parameter_groups(parameters: Mapping[str, nn.Parameter], section: OptimizerSection) -> Groups:
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: Groups, section: OptimizerSection, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=device.type in ("cpu", "cuda", "mps"),  # 2.6 times the speed of the loop on a CPU
        **arguments,
    )


def _muon(
    parameters: Mapping[str, nn.Parameter],
    section: OptimizerSection,
    arguments: dict[str, Any],
    vocabulary: frozenset[str],
) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for vectors and for what has a row for each token, as Muon's author has it
    (kellerjordan.github.io/posts/muon): a row of an embedding is no direction that a matrix maps to."""
    hidden = {name: p for name, p in parameters.items() if p.ndim == 2 and name not in vocabulary}
    rest = {name: p for name, p in parameters.items() if name not in hidden}
    if not hidden:
        raise PlanError("optimizer muon is for hidden matrices, and none is trained. Write `optimizer: adamw_torch`.")
    muon = torch.optim.Muon(parameter_groups(hidden, section), lr=0.0, **arguments)
    return SideBySide(muon, _adamw(parameter_groups(rest, section), section, {})) if rest else muon


def _of_bitsandbytes(
    kind: str, groups: Groups, section: OptimizerSection, device: torch.device, arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    """In 8 bits, the state is in blocks of 256 elements; that of tensors below 4,096 stays fp32 (min_8bit_size)."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise PlanError(
            f"optimizer {section.optimizer} needs bitsandbytes: pip install finetuner[quantize]\n"
            "Or write `optimizer: adamw_torch`."
        ) from error
    paged = section.optimizer.startswith("paged_") and device.type == "cuda"  # a CPU has nowhere to page to
    bits = "8bit" if section.optimizer.endswith("8bit") else "32bit"
    make = getattr(bitsandbytes.optim, f"{'Paged' if paged else ''}{kind}{bits}")
    return make(groups, lr=0.0, **arguments)
