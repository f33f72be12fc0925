"""The number format of forward and backward, chosen from the recipe and the device."""

from typing import Literal

from finetuner.errors import PlanError
from finetuner.recipe.sections import PrecisionSection
from finetuner.world import World

Precision = Literal["fp32", "bf16", "fp16"]


def choose_precision(section: PrecisionSection, world: World) -> Precision:
    """Choose the number format of forward and backward. Raises PlanError if the device does not have it.

    `bf16: true` needs a GPU that has it; on a CPU it is allowed, since it is right there and only slow where the
    processor emulates it. `auto` takes bf16 only where the device multiplies it natively.
    """
    if section.fp16:
        if world.device != "cuda":
            raise PlanError(f"fp16 needs a GPU, and this rank runs on {world.device}. Write `fp16: false`.")
        return "fp16"
    if section.bf16 is True and world.device == "cuda" and not world.bf16:
        raise PlanError("this GPU has no bfloat16. Write `bf16: auto` (fp32 here), or `bf16: false` and `fp16: true`.")
    use_bf16 = world.bf16 if section.bf16 == "auto" else section.bf16
    return "bf16" if use_bf16 else "fp32"
