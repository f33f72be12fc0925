"""torch.compile on each decoder layer: they are alike, so one is compiled and the others use it."""

import importlib.util
import shutil
from typing import TYPE_CHECKING

import torch

from finetuner.errors import ModelError, PlanError
from finetuner.recipe.sections import CompileSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILERS = ("g++", "clang++", "c++")


def wants_compilation(section: CompileSection, device: torch.device, *, engine: str | None, quantised: bool) -> bool:
    """`auto` is yes on a GPU where it can be done. Raises PlanError where it was asked for and cannot be done.

    `engine`: "deepspeed", "fsdp" or None; `quantised`: whether the base is in 4 or 8 bits.
    """
    if not section.torch_compile:
        return False
    obstacle = _obstacle(section.torch_compile_backend, device, engine=engine, quantised=quantised)
    if section.torch_compile == "auto":
        return device.type == "cuda" and obstacle is None
    if obstacle is not None:
        raise PlanError(f"torch_compile: {obstacle}. Or write `torch_compile: false`.")
    return True


def _obstacle(backend: str, device: torch.device, *, engine: str | None, quantised: bool) -> str | None:
    if engine == "deepspeed":
        return "it is supported on one rank, with DDP and with FSDP, not with deepspeed. Use `fsdp`"
    if quantised:
        return "the kernels of a base in 4 or 8 bits cannot be compiled with the layer. Use `adapter: lora`"
    if backend == "inductor" and device.type == "cpu" and not any(shutil.which(name) for name in COMPILERS):
        return f"there is no C++ compiler ({', '.join(COMPILERS)}). Install one"
    if backend == "inductor" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is missing: pip install triton"
    return None


def compile_layers(model: "PreTrainedModel", section: CompileSection) -> int:
    """Returns how many. Nothing is compiled before the first batch.

    Raises ModelError for a model that does not name its layers.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in named]
    if not layers:
        raise ModelError(f"{type(model).__name__} does not name its layers. Write `torch_compile: false`.")
    for layer in layers:
        layer.compile(backend=section.torch_compile_backend, mode=section.torch_compile_mode)
    return len(layers)
