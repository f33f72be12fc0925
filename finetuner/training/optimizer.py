"""Builds the optimizer that a recipe names over the trained parameters, in groups of one decay and learning rate."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from finetuner.errors import ModelError, PlanError
from finetuner.parallel.optimizer_state import CombinedOptimizer
from finetuner.recipe.optimizers import BLOCK_SIZE, OPTIMIZERS, is_hidden_matrix, read_arguments
from finetuner.recipe.sections import OptimizerSection, RatesSection

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerRequest:
    """The arguments of a builder, whose optimizer starts at lr 0: the loop sets the rate before each step.

    arguments: optim_args, as a block. rates: name -> learning rate as a multiple of the schedule's. tables: names of
    the parameters with a row for each token. device: where the update is computed.
    """

    parameters: Mapping[str, nn.Parameter]
    section: OptimizerSection
    arguments: dict[str, Any]
    rates: Mapping[str, float]
    tables: frozenset[str]
    device: torch.device

    @property
    def groups(self) -> Groups:
        return parameter_groups(self.parameters, self.section.weight_decay, self.rates)

    @property
    def betas(self) -> tuple[float, float]:
        return self.section.adam_beta1, self.section.adam_beta2


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    section: OptimizerSection,
    *,
    device: torch.device,
    rates: Mapping[str, float] | None = None,
    vocabulary: frozenset[str] = frozenset(),
) -> torch.optim.Optimizer:
    """Return the optimizer of the recipe's name; weight decay is for matrices, not for vectors (norms, biases).

    The learning rate is set by the loop before each step. `device`: where the update is computed. `rates`: see
    own_rates. `vocabulary`: names of the parameters with a row for each token.
    """
    require_optimizer(section.optimizer)
    arguments = read_arguments(section.optim_args)
    request = OptimizerRequest(parameters, section, arguments, rates or {}, vocabulary, device)
    return BUILDERS[OPTIMIZERS[section.optimizer].builder](request)


def require_optimizer(name: str) -> None:
    """Raise PlanError, before anything is loaded, if the package of a recipe's optimizer is not installed."""
    package = OPTIMIZERS[name].builder
    extra, other = _EXTRAS.get(package, ("", ""))
    if extra and importlib.util.find_spec(package) is None:
        raise PlanError(f"optimizer {name} needs {package}: pip install finetuner[{extra}]\nOr write {other}.")


# package of optimizers -> the extra that installs it, and what needs none
_EXTRAS = {
    "bitsandbytes": ("quantize", "`optimizer: adamw_torch`"),
    "torchao": ("torchao", "`optimizer: adamw_torch`, or adamw_bnb_8bit without FSDP"),
}


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, rates: Mapping[str, float]) -> Groups:
    """Return torch's parameter groups, those of matrices first: one for each decay and multiple of the learning rate.

    `rates`: name -> learning rate as a multiple of the schedule's, for parameters with their own.
    """
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
    """Return name -> learning rate as a multiple of `peak_lr`, for parameters with a rate of their own.

    Raises ModelError for a key that is about weights that are not trained.
    """
    rates: dict[str, float] = {}
    ratio = section.loraplus_lr_ratio
    if ratio is not None:  # as PEFT's create_loraplus_optimizer groups them
        rates |= {name: ratio for name, p in parameters.items() if "lora_B" in name or p.ndim == 1}
    rates |= _table_rates(parameters, section, peak_lr, vocabulary)
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


def _table_rates(
    parameters: Mapping[str, nn.Parameter], section: RatesSection, peak_lr: float, vocabulary: frozenset[str]
) -> dict[str, float]:
    """The rates of embeddings and head. Raises ModelError if a rate is given and none of them is trained."""
    key = "embedding_lr" if section.embedding_lr is not None else "embedding_lr_scale"
    scale = section.embedding_lr / peak_lr if section.embedding_lr is not None else section.embedding_lr_scale
    if scale is None:
        return {}
    tables = [name for name in parameters if name in vocabulary and "lora_" not in name]
    if not tables:
        raise ModelError(
            f"{key} is given, but no embedding is trained. Remove it, or train them beside the adapter:\n"
            "lora_modules_to_save: [embed_tokens, lm_head]"
        )
    return dict.fromkeys(tables, scale)


def _adamw(request: OptimizerRequest) -> torch.optim.Optimizer:
    groups = request.groups
    device = groups[0]["params"][0].device
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=request.betas,
        eps=request.section.adam_epsilon,
        fused=device.type in ("cpu", "cuda", "mps"),  # 2.6 times the speed of the loop on a CPU
        **request.arguments,
    )


def _muon(request: OptimizerRequest) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for vectors and for what has a row for each token, as Muon's author has it
    (kellerjordan.github.io/posts/muon): a row of an embedding is no direction that a matrix maps to."""
    parameters = request.parameters
    hidden = {n: p for n, p in parameters.items() if is_hidden_matrix(p.shape, is_table=n in request.tables)}
    rest = {name: p for name, p in parameters.items() if name not in hidden}
    if not hidden:
        raise PlanError("optimizer muon is for hidden matrices, and none is trained. Write `optimizer: adamw_torch`.")
    muon = torch.optim.Muon(replace(request, parameters=hidden).groups, lr=0.0, **request.arguments)
    return CombinedOptimizer(muon, _adamw(replace(request, parameters=rest, arguments={}))) if rest else muon


def _bitsandbytes(request: OptimizerRequest) -> torch.optim.Optimizer:
    """In 8 bits, the state is in blocks of 256 elements; that of tensors below 4,096 stays fp32 (min_8bit_size)."""
    import bitsandbytes

    row, options = OPTIMIZERS[request.section.optimizer], dict(request.arguments)
    paged = row.is_paged and request.device.type == "cuda"  # a CPU has nowhere to page to
    if row.uses_epsilon:
        options["eps"] = request.section.adam_epsilon
    make = getattr(bitsandbytes.optim, f"{'Paged' if paged else ''}{row.class_name}")
    return make(request.groups, lr=0.0, betas=request.betas, **options)


class _WithoutCompiling(CombinedOptimizer):
    """An optimizer of torchao, which compiles its step. On a CPU that needs a C++ compiler, and takes a minute."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with torch.compiler.set_stance("force_eager"):
            super().step()


def _torchao(request: OptimizerRequest) -> torch.optim.Optimizer:
    """Moments in 8 or 4 bits, in blocks; those of tensors below 4,096, or of no whole blocks, stay fp32.

    Blocks of 256, as transformers has them in 4 bits too, where torchao's own default is 128.
    """
    from torchao.optim import adam

    make = getattr(adam, OPTIMIZERS[request.section.optimizer].class_name)
    options = {"block_size": BLOCK_SIZE} | request.arguments
    made = make(request.groups, lr=0.0, betas=request.betas, eps=request.section.adam_epsilon, **options)
    return _WithoutCompiling(made) if request.device.type == "cpu" else made


def _adafactor(request: OptimizerRequest) -> torch.optim.Optimizer:
    """transformers' Adafactor, not torch's, which scales the rate by the size of each parameter whatever it is told.

    The rates of people's recipes are for this one, and for these two settings, which are those of transformers'
    Trainer.
    """
    from transformers.optimization import Adafactor

    settings = {"scale_parameter": False, "relative_step": False}
    return Adafactor(request.groups, lr=0.0, **settings | request.arguments)


def _rmsprop(request: OptimizerRequest) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(request.groups, lr=0.0, eps=request.section.adam_epsilon, **request.arguments)


def _adagrad(request: OptimizerRequest) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(request.groups, lr=0.0, eps=request.section.adam_epsilon, **request.arguments)


def _sgd(request: OptimizerRequest) -> torch.optim.Optimizer:
    return torch.optim.SGD(request.groups, lr=0.0, **request.arguments)


# `builder` of a row of recipe/optimizers.py -> the function that makes its optimizer
BUILDERS: dict[str, Callable[[OptimizerRequest], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}
