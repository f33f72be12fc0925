"""Parameters -> optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetuner.errors import ModelError, PlanError
from finetuner.parallel.optimizer_state import SideBySide
from finetuner.recipe.optimizers import read_arguments
from finetuner.recipe.sections import OptimizerSection, RatesSection

Groups = list[dict[str, Any]]


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    section: OptimizerSection,
    *,
    device: torch.device,
    rates: Mapping[str, float] | None = None,
    vocabulary: frozenset[str] = frozenset(),
) -> torch.optim.Optimizer:
    """The optimizer of the recipe's name over groups of parameters: matrices, which decay, and vectors (norms, biases),
    which do not.

    The learning rate is set by the loop before each step. `device`: where the update is computed. `rates`: see
    own_rates. `vocabulary`: names of the parameters with a row for each token.
    """
    name, arguments = section.optimizer, read_arguments(section.optim_args)
    if name == "muon":
        return _muon(parameters, section, arguments, rates or {}, vocabulary)
    groups = parameter_groups(parameters, section.weight_decay, rates or {})
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


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, rates: Mapping[str, float]) -> Groups:
    """Matrices first. `rates`: name -> learning rate of its own, as a multiple of the schedule's."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for is_vector in (False, True):
        for name, parameter in parameters.items():
            if (parameter.ndim < 2) != is_vector:
                continue
            scale = rates.get(name, 1.0)
            of = {"params": [], "weight_decay": 0.0 if is_vector else weight_decay, "lr_scale": scale}
            groups.setdefault((is_vector, scale), of)["params"].append(parameter)
    return list(groups.values())


def own_rates(
    parameters: Mapping[str, nn.Parameter], section: RatesSection, peak_lr: float, vocabulary: frozenset[str]
) -> dict[str, float]:
    """name -> learning rate as a multiple of `peak_lr`, for those that have their own.

    Raises ModelError for a key that is about weights that are not trained.
    """
    tables = [name for name in parameters if name in vocabulary and "lora_" not in name]
    rates: dict[str, float] = {}
    ratio = section.loraplus_lr_ratio
    if ratio is not None:  # as PEFT's create_loraplus_optimizer groups them
        rates |= {name: ratio for name, p in parameters.items() if "lora_B" in name or p.ndim == 1}
    scale = section.embedding_lr / peak_lr if section.embedding_lr is not None else section.embedding_lr_scale
    if scale is not None and not tables:
        key = "embedding_lr" if section.embedding_lr is not None else "embedding_lr_scale"
        raise ModelError(
            f"{key} is given, but no embedding is trained. Remove it, or train them beside the adapter:\n"
            "lora_modules_to_save: [embed_tokens, lm_head]"
        )
    rates |= dict.fromkeys(tables, scale) if scale is not None else {}
    for group in section.lr_groups:
        for text in group.modules:
            named = [name for name in parameters if text in name]
            if not named:
                raise ModelError(
                    f"lr_groups '{group.name}': no weight that is trained has '{text}' in its name.\n"
                    f"They look like: {', '.join(list(parameters)[:3])}, ..."
                )
            rates |= dict.fromkeys(named, group.lr / peak_lr)
    return rates


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
    rates: Mapping[str, float],
    vocabulary: frozenset[str],
) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for vectors and for what has a row for each token, as Muon's author has it
    (kellerjordan.github.io/posts/muon): a row of an embedding is no direction that a matrix maps to."""
    hidden = {name: p for name, p in parameters.items() if p.ndim == 2 and name not in vocabulary}
    rest = {name: p for name, p in parameters.items() if name not in hidden}
    if not hidden:
        raise PlanError("optimizer muon is for hidden matrices, and none is trained. Write `optimizer: adamw_torch`.")
    muon = torch.optim.Muon(parameter_groups(hidden, section.weight_decay, rates), lr=0.0, **arguments)
    if not rest:
        return muon
    return SideBySide(muon, _adamw(parameter_groups(rest, section.weight_decay, rates), section, {}))


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
