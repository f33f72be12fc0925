"""torch.compile on each decoder layer: they are alike, so one is compiled and the others use its code."""

import importlib.util
import shutil
from typing import TYPE_CHECKING

import torch

from finetuner.errors import ModelError, PlanError
from finetuner.models.transformers_internals import layer_class_names
from finetuner.recipe.sections import CompileSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILERS = ("g++", "clang++", "c++")


def wants_compilation(section: CompileSection, device: torch.device, *, engine: str | None, quantized: bool) -> bool:
    """Return whether to compile the layers: `auto` means yes on a GPU where it can be done.

    `engine`: "deepspeed", "fsdp" or None; `quantized`: whether the base is in 4 or 8 bits. Raises PlanError where the
    recipe asks for it and it cannot be done.
    """
    if not section.torch_compile:
        return False
    obstacle = _obstacle(section.torch_compile_backend, device, engine=engine, quantized=quantized)
    if section.torch_compile == "auto":
        return device.type == "cuda" and obstacle is None
    if obstacle is not None:
        raise PlanError(f"torch_compile: {obstacle}. Or write `torch_compile: false`.")
    return True


def _obstacle(backend: str, device: torch.device, *, engine: str | None, quantized: bool) -> str | None:
    """Return what stands in the way of compiling, with what to do about it, or None."""
    if engine == "deepspeed":
        return "it is supported on one rank, with DDP and with FSDP, not with deepspeed. Use `fsdp`"
    if quantized:
        return "the kernels of a base in 4 or 8 bits cannot be compiled with the layer. Use `adapter: lora`"
    if backend == "inductor" and device.type == "cpu" and not any(shutil.which(name) for name in COMPILERS):
        return f"there is no C++ compiler ({', '.join(COMPILERS)}). Install one"
    if backend == "inductor" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is missing: pip install triton"
    return None


def compile_layers(model: "PreTrainedModel", section: CompileSection) -> int:
    """Mark each decoder layer to be compiled at the first batch; return how many there are.

    Raises ModelError for a model that does not name its layers.
    """
    named = layer_class_names(model)
    layers = [module for module in model.modules() if type(module).__name__ in named]
    if not layers:
        raise ModelError(f"{type(model).__name__} does not name its layers. Write `torch_compile: false`.")
    for layer in layers:
        layer.compile(backend=section.torch_compile_backend, mode=section.torch_compile_mode)
    return len(layers)
