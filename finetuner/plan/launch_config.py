"""The configuration of `accelerate launch --config_file`, compared with the recipe."""

from collections.abc import Mapping
from typing import Any

from finetuner.errors import PlanError
from finetuner.plan.parallel import ParallelPlan
from finetuner.plan.precision import Precision
from finetuner.recipe.deepspeed import read_deepspeed
from finetuner.world import Launch

_SOURCE = "the configuration of accelerate launch"
_ADVICE = {
    "fsdp": "Add `fsdp: [full_shard, auto_wrap]` to the recipe",
    "deepspeed": "Add `deepspeed: deepspeed_configs/zero2.json` to the recipe",
}


def require_same_launch_config(
    launch: Launch,
    asked: str | None,
    plan: ParallelPlan,
    precision: Precision,
    deepspeed: str | Mapping[str, Any] | None,
) -> None:
    """Raise PlanError where the launcher's configuration asks for something else than the recipe.

    `asked`: the engine that the recipe names ("fsdp", "deepspeed" or None); `deepspeed`: the recipe's key.
    """
    if launch.engine is not None and launch.engine != asked:
        says = f"`{asked}`" if asked else "neither fsdp nor deepspeed"
        raise PlanError(
            f"{_SOURCE} asks for {launch.engine}, the recipe has {says}.\n{_ADVICE[launch.engine]}, or launch "
            "without it."
        )
    if launch.mixed_precision in ("bf16", "fp16") and launch.mixed_precision != precision:
        raise PlanError(
            f"{_SOURCE} says mixed_precision: {launch.mixed_precision}, but by the recipe and this device the run "
            f"computes in {precision}.\nWrite `{launch.mixed_precision}: true` in the recipe, or mixed_precision: 'no' "
            "there."
        )
    differences = [*_fsdp_differences(launch, plan), *_deepspeed_differences(launch, plan, deepspeed)]
    if differences:
        lines = "\n  ".join(f"{key}: {other} there, {here} by the recipe" for key, other, here in differences)
        raise PlanError(f"{_SOURCE} contradicts the recipe:\n  {lines}\nMake them the same, or launch without it.")


Difference = tuple[str, object, object]  # key of the launcher's file, its value, the recipe's


def _fsdp_differences(launch: Launch, plan: ParallelPlan) -> list[Difference]:
    if plan.fsdp is None or launch.engine != "fsdp":
        return []
    by_recipe: dict[str, object] = {
        "fsdp_offload_params": plan.fsdp.offload,
        "fsdp_cpu_ram_efficient_loading": plan.fsdp.main_rank_reads or None,
        "fsdp_reshard_after_forward": plan.fsdp.reshard_after_forward,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT" if plan.fsdp.sharded_checkpoints else "FULL_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": ",".join(plan.fsdp.layer_classes) or None,
        "dp_replicate_size": str(plan.replicate),
        "dp_shard_size": str(plan.shard),
    }
    found: list[Difference] = []
    for key, value in by_recipe.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        if value is not None and launch.settings.get(key, shown) != shown:
            found.append((key, launch.settings[key], shown))
    return found


def _deepspeed_differences(
    launch: Launch, plan: ParallelPlan, deepspeed: str | Mapping[str, Any] | None
) -> list[Difference]:
    if plan.zero is None or launch.engine != "deepspeed":
        return []
    file = launch.settings.get("deepspeed_config_file")
    if file is not None:
        assert deepspeed is not None
        named = deepspeed if isinstance(deepspeed, str) else "a block of its own"
        return [("deepspeed_config_file", file, named)] if read_deepspeed(file) != read_deepspeed(deepspeed) else []
    stage = str(plan.zero.stage)
    there = launch.settings.get("zero_stage", stage)
    return [("zero_stage", there, plan.zero.stage)] if there != stage else []
