"""The attention implementation that a model runs, chosen on the machine that runs it."""

import importlib.util

from finetuner.errors import ModelError
from finetuner.plan.precision import Precision
from finetuner.world import World


def choose_attention(requested: str, world: World, precision: Precision) -> tuple[str, ...]:
    """Return transformers' names of the implementations to try, the best first: not every architecture has all.

    `auto` takes flash attention where the package is installed, the device is a GPU and the precision is 16 bits wide
    (its kernels have no fp32), else SDPA. Raises ModelError if the recipe insists on what cannot run here.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if requested == "flash_attention_2":
        if world.device != "cuda":
            raise ModelError(
                f"flash_attention_2 needs a GPU; this rank runs on {world.device}. Write `attn_implementation: auto`."
            )
        if not installed:
            raise ModelError("flash_attention_2 needs the package flash-attn: pip install 'finetuner[flash]'.")
        if precision == "fp32":
            raise ModelError(
                "flash_attention_2 has no fp32 kernels. Write `bf16: auto`, or `attn_implementation: sdpa`."
            )
    if requested != "auto":
        return (requested,)
    flash = installed and world.device == "cuda" and precision != "fp32"
    return ("flash_attention_2", "sdpa", "eager") if flash else ("sdpa", "eager")
