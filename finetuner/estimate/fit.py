"""Check that a model fits into memory, before anything but its config.json is fetched.

Activations come on top of what plan/memory.py counts, so what is refused here cannot run, while what passes may still
be too large.
"""

import math
from typing import TYPE_CHECKING

import torch

from finetuner.errors import PlanError
from finetuner.models.embeddings import vocabulary_parameters
from finetuner.models.empty_model import meta_model_if_possible
from finetuner.models.quant_format import choose_quant_format
from finetuner.plan.memory import ModelBytes, bytes_of_a_rank, bytes_of_training, without_paged_state
from finetuner.plan.parallel import ParallelPlan
from finetuner.plan.precision import Precision
from finetuner.plan.run import Plan
from finetuner.recipe.optimizers import TrainedTensor
from finetuner.recipe.sections import AdapterSection, ModelSection, OptimizerSection, QuantizationSection
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def require_fit(
    model_section: ModelSection,
    adapter: AdapterSection,
    quantization: QuantizationSection,
    optimizer: OptimizerSection,
    plan: Plan,
    world: World,
    attention: tuple[str, ...],
    config: "PreTrainedConfig | None" = None,
) -> None:
    """Raise PlanError, with what would fit, if the model cannot fit into this rank's memory.

    Says nothing of a model whose size cannot be known without running its own code. `config`: of a model that is not in
    base_model.
    """
    if world.device_memory is None or model_section.trust_remote_code:
        return
    source = config or model_section.base_model
    model = model_without_weights(source, adapter, quantization, plan.precision, attention)
    if model is None:
        return
    total = training_memory(model, adapter, quantization, optimizer, plan)
    per_rank = bytes_of_a_rank(without_paged_state(total, optimizer, world.device), plan.parallel)
    on_cpu = world.device == "cpu"
    checks = [
        (per_rank.device, world.device_memory, f"this rank's share of the RAM is {{}} (the device is {world.device})")
        if on_cpu
        else (per_rank.device, world.device_memory, "its GPU has {} free"),
        (per_rank.host * world.local_size, world.host_memory, "this node has {} of RAM available for its ranks"),
    ]
    for needed, available, words in checks:
        in_ram = on_cpu or words.startswith("this node")
        if available is not None and needed > available:
            layout = "on each rank" if plan.parallel.is_replicated else f"with {plan.parallel.name}"
            advice = ways_to_fit(
                adapter,
                quantization,
                plan.parallel,
                world,
                needed / available,
                in_ram=in_ram,
                from_scratch=model_section.model is not None,
            )
            raise PlanError(
                f"'{model_section.base_model}' does not fit: {layout}, it takes {_gb(needed)} "
                f"(weights {_gb(total.weights)}, gradients {_gb(total.gradients)}, optimizer {_gb(total.optimizer)} in "
                f"all; activations come on top), and {words.format(_gb(available))}.\n"
                + "\n".join(f"  {line}" for line in advice)
            )


def model_without_weights(
    source: "str | PreTrainedConfig",
    adapter: AdapterSection,
    quantization: QuantizationSection,
    precision: Precision,
    attention: tuple[str, ...],
) -> "PreTrainedModel | None":
    """Return a model on the meta device, in the number formats it is trained in.

    None where it cannot be built from its config.
    """
    dtype = torch.float32 if adapter.adapter is None or precision == "fp32" else torch.bfloat16
    quant_format = choose_quant_format(adapter.adapter, quantization, dtype)
    return meta_model_if_possible(source, dtype=dtype, attention=attention, quant_format=quant_format)


def training_memory(
    model: "PreTrainedModel",
    adapter: AdapterSection,
    quantization: QuantizationSection,
    optimizer: OptimizerSection,
    plan: Plan,
) -> ModelBytes:
    """Bytes that a `model` without weights takes between steps, over all ranks; an adapter is too small to count."""
    if adapter.adapter is None and adapter.unfrozen_parameters is None:
        bf16 = plan.precision == "bf16"
        return bytes_of_training(trained_tensors(model), optimizer, parallel=plan.parallel, bf16=bf16)
    num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    return ModelBytes(num_bytes // 2 if quantization.load_in_8bit else num_bytes)


def trained_tensors(model: "PreTrainedModel") -> list[TrainedTensor]:
    """Return the shapes of all parameters of a `model`; a tied head is the embedding's."""
    tables = vocabulary_parameters(model, model)
    return [TrainedTensor(tuple(p.shape), name in tables) for name, p in model.named_parameters()]


def ways_to_fit(
    adapter: AdapterSection,
    quantization: QuantizationSection,
    parallel: ParallelPlan,
    world: World,
    times: float,
    *,
    in_ram: bool,
    from_scratch: bool,
) -> list[str]:
    """Return lines of advice, the strongest first, for a model that is `times` too large.

    `in_ram`: too large for the RAM of the node, which all its ranks share.
    """
    lines = []
    if world.device == "cpu":
        lines.append("This machine shows no GPU to PyTorch: start it where `nvidia-smi` lists one.")
    if from_scratch:
        lines.append("model: fewer layers, or less width   makes it smaller")
    elif adapter.adapter is None:
        lines.append("adapter: qlora   trains an adapter on a base in 4 bits instead: 0.55 bytes a weight, not 16")
    elif adapter.adapter == "lora" and not quantization.load_in_8bit:
        lines.append("adapter: qlora   keeps the base in 4 bits: 0.55 bytes a weight, not 2")
    if not parallel.shards_weights:
        lines.append("fsdp: [full_shard, auto_wrap]   spreads the model over the ranks")
        return lines
    ranks = math.ceil(times * parallel.shard)
    if in_ram:
        nodes, now = math.ceil(ranks / world.local_size), -(-world.size // world.local_size)
        lines.append(f"more nodes: {nodes} or more like this one share what {now} cannot")
    else:
        lines.append(f"more ranks: {ranks} or more share what {world.size} cannot")
    if world.device == "cuda" and not parallel.offloads_optimizer:
        lines.append("fsdp: [full_shard, auto_wrap, offload]   keeps it in the RAM of the nodes")
    return lines


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
