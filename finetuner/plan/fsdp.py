"""FSDP in a recipe -> FSDP2 (torch's `fully_shard`) on this world.

FSDP1's words are mapped onto FSDP2:

    full_shard            weights, gradients and optimizer sharded over all ranks (ZeRO-3)
    shard_grad_op         the same, but gathered weights stay until the backward is done (ZeRO-2's traffic)
    hybrid_shard          full_shard among the ranks of a node, copies between nodes
    hybrid_shard_zero2    shard_grad_op among the ranks of a node, copies between nodes
    no_shard              a copy on each rank: DDP
"""

from finetuner.errors import PlanError
from finetuner.plan.parallel import FsdpOptions, ParallelPlan, ParallelRequest
from finetuner.plan.precision import Precision
from finetuner.recipe.sections import FsdpConfig, ShardingSection
from finetuner.recipe.sections.sharding import STRATEGIES
from finetuner.world import World


def plan(request: ParallelRequest) -> tuple[ParallelPlan, tuple[str, ...]]:
    """Return the layout that a recipe's fsdp keys ask for, and notes on what was mapped.

    Raises PlanError for sizes that do not multiply to the number of ranks, and for another precision than the run's.
    """
    section, world, precision = request.section, request.world, request.precision
    config = section.fsdp_config or FsdpConfig()
    strategy = _strategy(section, config)
    notes = []
    if (section.fsdp_version or config.version) == 1:
        notes.append("fsdp_version 1: FSDP2 does the same with these keys, and is used.")
    if strategy == "no_shard":
        return ParallelPlan(replicate=world.size), (*notes, "fsdp no_shard is DDP: each rank holds a whole copy.")
    shards, replicas = world.size, 1
    hybrid = strategy.startswith("hybrid_shard")
    if hybrid or section.dp_shard_size or section.dp_replicate_size:
        shards, replicas = _mesh_sizes(section, world, hybrid=hybrid)
        if hybrid and replicas == 1:
            notes.append(
                f"{strategy}: the ranks hold one copy of the model, so there are no copies to keep equal "
                "(dp_replicate_size and dp_shard_size change that)."
            )
    if config.sync_module_states is False:
        notes.append("sync_module_states: all ranks start from the same weights in any case.")
    options = _options(config, world, precision, strategy, offload="offload" in section.fsdp)
    return ParallelPlan("fsdp", replicate=replicas, shard=shards, fsdp=options), tuple(notes)


def _strategy(section: ShardingSection, config: FsdpConfig) -> str:
    named = [word for word in section.fsdp if word in STRATEGIES]
    return config.sharding_strategy or (named[0] if named else "full_shard")


def _options(config: FsdpConfig, world: World, precision: Precision, strategy: str, *, offload: bool) -> FsdpOptions:
    """Return FSDP2's options. Raises PlanError for another precision than the run's."""
    if config.mixed_precision_policy == "bf16" and precision != "bf16":
        raise PlanError(
            f"fsdp_config.mixed_precision_policy is bf16, but the run computes in {precision}. "
            "Write `bf16: true`, or remove mixed_precision_policy."
        )
    reshards = strategy in ("full_shard", "hybrid_shard")
    return FsdpOptions(
        reshard_after_forward=reshards if config.reshard_after_forward is None else config.reshard_after_forward,
        offload=config.offload_params or offload,
        pin_memory=config.cpu_offload_pin_memory and world.device == "cuda",
        layer_classes=config.transformer_layer_cls_to_wrap,
        wraps_layers=config.auto_wrap_policy != "NO_WRAP",
        main_rank_reads=config.cpu_ram_efficient_loading,
        sharded_checkpoints=config.state_dict_type == "SHARDED_STATE_DICT",
        forward_prefetch=config.forward_prefetch,
        gathers_bf16=precision == "bf16" and config.mixed_precision_policy != "fp32",
    )


def _mesh_sizes(section: ShardingSection, world: World, *, hybrid: bool) -> tuple[int, int]:
    """Return (ranks that share one copy, copies). Without sizes, hybrid_shard keeps one copy on each node."""
    shards = section.dp_shard_size
    if shards is None:
        shards = world.size // section.dp_replicate_size if section.dp_replicate_size else world.local_size
    replicas = section.dp_replicate_size or (max(1, world.size // shards) if hybrid else 1)
    if shards * replicas != world.size:
        raise PlanError(
            f"{replicas} copies x {shards} ranks are {replicas * shards} ranks, but {world.size} were "
            "started. Set dp_shard_size and dp_replicate_size so that their product is the number of ranks."
        )
    return shards, replicas
