"""`finetuner env`: what a bug report needs to say about a machine, as text to paste or as JSON.

It has to work where nothing else does: every fact is read by itself, and one that cannot be read says why in its place.
"""

import json
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, TypeVar

import typer

from finetuner import __version__
from finetuner.commands.arguments import Overrides
from finetuner.errors import FinetunerError
from finetuner.recipe.convert import check_lines
from finetuner.redaction import hidden
from finetuner.world import World, launcher_variables, visible_gpus

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "flash-attn", "deepspeed", "datasets", "tokenizers",
    "fastokens", "safetensors", "pydantic",
)  # fmt: skip

Fact = TypeVar("Fact")
Facts = dict[str, dict[str, Any]]  # heading -> name -> a text, a number, or None where a package is not installed


def describe_environment(recipe: str | None = None, overrides: Iterable[str] = ()) -> Facts:
    """Versions, devices, launcher variables and, where a recipe is named, the lines of `finetuner check`.

    Raises nothing for what is broken here: that is what the report is for.
    """
    facts: Facts = {
        "versions": {"finetuner": __version__, "python": platform.python_version(), "platform": platform.platform()},
        "packages": {package: _installed_version(package) for package in PACKAGES},
        "devices": {"torch build": _or_why_not(_torch_build), **_devices(), **_gpus()},
        "variables": {name: hidden(value) for name, value in launcher_variables().items()},
    }
    if recipe is not None:
        facts["recipe"] = {"file": recipe, "check": _check_result(recipe, list(overrides))}
    return facts


def as_text(facts: Facts) -> str:
    """The facts in aligned lines under headings."""
    width = max(len(name) for block in facts.values() for name in block)
    blocks = []
    for heading, block in facts.items():
        lines = [heading]
        for name, value in block.items():
            shown = "not installed" if value is None else str(value)
            first, *others = shown.splitlines() or [""]
            lines += [f"  {name:{width}}  {first}".rstrip(), *(f"  {'':{width}}  {line}".rstrip() for line in others)]
        blocks.append("\n".join(lines if block else [heading, "  none"]))
    return "\n\n".join(blocks)


def env(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", show_default=False)] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="The facts as JSON.")] = False,
) -> None:
    """Print the report, to paste into an issue."""
    facts = describe_environment(recipe, overrides or [])
    typer.echo(json.dumps(facts, indent=1) if as_json else as_text(facts))


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _or_why_not(read: Callable[[], Fact]) -> Fact | str:
    """The fact, or in its place the reason why it cannot be read: a broken driver must not end the report."""
    try:
        return read()
    except Exception as error:
        return hidden(f"cannot be read: {type(error).__name__}: {error}")


def _torch_build() -> str:
    import torch

    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"


def _devices() -> dict[str, Any]:
    world = _or_why_not(World.detect)
    if isinstance(world, str):
        return {"device": world}
    return {
        "device": world.device + (f", {world.device_name}" if world.device_name else ""),
        "bf16": "native" if world.bf16 else "emulated",
        "CPU threads": world.num_threads,
        "free memory of a rank": _gigabytes(world.device_memory),
        "available RAM": _gigabytes(world.host_memory),
        "ranks": f"{world.size}, of which {world.local_size} on this node",
    }


def _gpus() -> dict[str, str]:
    gpus = _or_why_not(visible_gpus)
    if isinstance(gpus, str):
        return {"GPUs": gpus}
    return {
        f"GPU {i}": f"{name}, {_gigabytes(free)} of {_gigabytes(total)} free"
        for i, (name, free, total) in enumerate(gpus)
    }


def _gigabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:,.1f} GB"


def _check_result(recipe: str, overrides: list[str]) -> str:
    try:
        return hidden("\n".join(check_lines(recipe, overrides, verbose=False)))
    except FinetunerError as error:
        return hidden(str(error))
    except Exception as error:  # a bug of ours: the report is about it
        return hidden(f"check failed: {type(error).__name__}: {error}")
