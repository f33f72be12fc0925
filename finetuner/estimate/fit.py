"""Does the model fit, before anything but its config.json is fetched?

Activations come on top of what kept.py counts, so what is refused here cannot run, while what passes may still be too
large.
"""

import math
from typing import TYPE_CHECKING

import torch

from finetuner.errors import PlanError
from finetuner.models.load import bare_bones, vocabulary_parameters
from finetuner.models.quantized import choose_format
from finetuner.plan.memory import ModelBytes, bytes_of_a_rank, bytes_of_training, without_paged_state
from finetuner.plan.parallel import ZeroPlan
from finetuner.plan.run import Plan
from finetuner.recipe import Recipe
from finetuner.recipe.optimizers import TrainedTensor
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def require_fit(
    recipe: Recipe,
    plan: Plan,
    world: World,
    attention: tuple[str, ...],
    config: "PreTrainedConfig | None" = None,
) -> None:
    """Raises PlanError if the model cannot fit into this rank's memory, with what would. Says nothing of a model whose
    size cannot be known without running its own code. `config`: of a model that is not in base_model."""
    if world.device_memory is None or recipe.model.trust_remote_code:
        return
    model = model_without_weights(recipe, plan, attention, config)
    if model is None:
        return
    parts = parts_to_keep(recipe, plan, model)
    kept = bytes_of_a_rank(without_paged_state(parts, recipe.optimizer, world.device), plan.engine)
    on_cpu = world.device == "cpu"
    checks = [
        (kept.device, world.device_memory, f"this rank's share of the RAM is {{}} (the device is {world.device})")
        if on_cpu
        else (kept.device, world.device_memory, "its GPU has {} free"),
        (kept.host * world.local_size, world.host_memory, "this node has {} of RAM available for its ranks"),
    ]
    for needed, there, words in checks:
        in_ram = on_cpu or words.startswith("this node")
        if there is not None and needed > there:
            raise PlanError(
                f"'{recipe.model.base_model}' does not fit: {_engine_name(plan)}, it takes {_gb(needed)} "
                f"(weights {_gb(parts.weights)}, gradients {_gb(parts.gradients)}, optimizer {_gb(parts.optimizer)} in "
                f"all; activations come on top), and {words.format(_gb(there))}.\n"
                + "\n".join(f"  {line}" for line in advice(recipe, plan, world, needed / there, in_ram=in_ram))
            )


def model_without_weights(
    recipe: Recipe, plan: Plan, attention: tuple[str, ...], config: "PreTrainedConfig | None" = None
) -> "PreTrainedModel | None":
    """On the meta device, in the number formats it is trained in; None where it cannot be built from its config."""
    dtype = torch.float32 if recipe.adapter.adapter is None or plan.precision == "fp32" else torch.bfloat16
    form = choose_format(recipe.adapter.adapter, recipe.quantization, dtype)
    return bare_bones(config or recipe.model.base_model, dtype=dtype, attention=attention, form=form)


def parts_to_keep(recipe: Recipe, plan: Plan, model: "PreTrainedModel") -> ModelBytes:
    """Of a `model` without weights; an adapter is too small to count."""
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    if recipe.adapter.adapter is None and recipe.adapter.unfrozen_parameters is None:
        return bytes_of_training(
            trained_tensors(model), recipe.optimizer, engine=plan.engine, bf16=plan.precision == "bf16"
        )
    return ModelBytes(weights // 2 if recipe.quantization.load_in_8bit else weights)


def trained_tensors(model: "PreTrainedModel") -> list[TrainedTensor]:
    """Shapes of all parameters of a `model`; a tied head is the embedding's."""
    tables = vocabulary_parameters(model, model)
    return [TrainedTensor(tuple(p.shape), name in tables) for name, p in model.named_parameters()]


def advice(recipe: Recipe, plan: Plan, world: World, times: float, *, in_ram: bool) -> list[str]:
    """What makes it smaller, the strongest first; `times` too large is it now. `in_ram`: for the RAM of the node, which
    all its ranks share."""
    lines = []
    if world.device == "cpu":
        lines.append("This machine shows no GPU to PyTorch: start it where `nvidia-smi` lists one.")
    if recipe.model.model is not None:
        lines.append("model: fewer layers, or less width   makes it smaller")
    elif recipe.adapter.adapter is None:
        lines.append("adapter: qlora   trains an adapter on a base in 4 bits instead: 0.55 bytes a weight, not 16")
    elif recipe.adapter.adapter == "lora" and not recipe.quantization.load_in_8bit:
        lines.append("adapter: qlora   keeps the base in 4 bits: 0.55 bytes a weight, not 2")
    if plan.engine is None or (isinstance(plan.engine, ZeroPlan) and plan.engine.stage < 3):
        lines.append("fsdp: [full_shard, auto_wrap]   spreads the model over the ranks")
    else:
        ranks = math.ceil(times * plan.engine.num_shards)
        if in_ram:
            nodes, now = math.ceil(ranks / world.local_size), -(-world.size // world.local_size)
            lines.append(f"more nodes: {nodes} or more like this one share what {now} cannot")
        else:
            lines.append(f"more ranks: {ranks} or more share what {world.size} cannot")
        if world.device == "cuda" and not plan.engine.offload:
            lines.append("fsdp: [full_shard, auto_wrap, offload]   keeps it in the RAM of the nodes")
    return lines


def _engine_name(plan: Plan) -> str:
    return "on each rank" if plan.engine is None else f"with {plan.engine.name}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
