"""Which engine a run has, derived from the recipe and the world: DDP, FSDP2 or DeepSpeed's ZeRO.

FSDP1's words are mapped onto FSDP2 (torch's `fully_shard`):

    full_shard            parameters, gradients and optimizer in parts on all ranks (ZeRO-3)
    shard_grad_op         the same, but gathered weights stay until the backward is done (ZeRO-2's traffic)
    hybrid_shard          full_shard among the ranks of a node, copies between nodes
    hybrid_shard_zero2    shard_grad_op among the ranks of a node, copies between nodes
    no_shard              a copy on each rank: DDP
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuner.errors import PlanError
from finetuner.plan.precision import Precision
from finetuner.recipe.deepspeed import read_deepspeed
from finetuner.recipe.sections import FsdpConfig, ShardingSection
from finetuner.recipe.sections.sharding import STRATEGIES
from finetuner.world import Launch, World


@dataclass(frozen=True)
class FsdpPlan:
    """`num_replicas` copies of the model, each in `num_shards` parts."""

    num_shards: int
    num_replicas: int = 1
    reshard_after_forward: bool = True
    offload: bool = False
    pin_memory: bool = True
    layer_classes: tuple[str, ...] = ()  # empty: those that the model names
    wraps_layers: bool = True
    main_rank_reads: bool = False
    sharded_checkpoints: bool = False
    forward_prefetch: bool = False
    gathers_bf16: bool = False  # weights that are trained travel, and compute, in bf16

    @property
    def name(self) -> str:
        ways = _ranks(self.num_shards)
        if self.num_replicas > 1:
            ways = f"{self.num_replicas} copies x {ways}"
        kept = "" if self.reshard_after_forward else ", gathered weights kept until the backward is done"
        return f"FSDP2 over {ways}{kept}{', offloaded to the CPU' if self.offload else ''}"


@dataclass(frozen=True)
class ZeroPlan:
    """DeepSpeed's configuration without "auto", but for HIDDEN_SIZE_KEYS, which need the model."""

    stage: int
    num_shards: int
    config: Mapping[str, Any] = field(repr=False)
    filled_in: tuple[str, ...] = ()  # dotted names of what the user left as "auto"

    @property
    def offload(self) -> bool:
        zero = self.config["zero_optimization"]
        blocks = (zero.get("offload_optimizer"), zero.get("offload_param"))
        return any((block or {}).get("device", "none") != "none" for block in blocks)

    @property
    def name(self) -> str:
        return f"ZeRO-{self.stage} over {_ranks(self.num_shards)}{', offloaded to the CPU' if self.offload else ''}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


EnginePlan = FsdpPlan | ZeroPlan | None  # None: a copy on each rank


def plan_engine(
    section: ShardingSection,
    world: World,
    *,
    precision: Precision,
    micro_batch: int,
    grad_accum: int,
    max_grad_norm: float,
) -> tuple[EnginePlan, tuple[str, ...]]:
    """The engine, and notes on what was mapped. Raises PlanError for what this world or the launcher cannot do."""
    engine: EnginePlan = None
    notes: tuple[str, ...] = ()
    if section.uses_fsdp:
        engine, notes = _plan_fsdp(section, world, precision)
    elif section.deepspeed is not None:
        engine = _plan_zero(section.deepspeed, world, precision, micro_batch, grad_accum, max_grad_norm)
    asked = "fsdp" if section.uses_fsdp else "deepspeed" if engine is not None else None
    refuse_another_launch_config(world.launch, asked, engine, precision, section.deepspeed)
    if engine is not None and precision == "fp16":
        raise PlanError(
            f"fp16 is supported on one GPU and with DDP, not with {asked}. Write `bf16: true` and `fp16: false`."
        )
    if engine is not None and world.device == "mps":
        raise PlanError(f"{asked} needs GPUs of NVIDIA or AMD, or CPU ranks; this is {world.device}. Remove it.")
    return engine, notes


def _plan_fsdp(section: ShardingSection, world: World, precision: Precision) -> tuple[EnginePlan, tuple[str, ...]]:
    config = section.fsdp_config or FsdpConfig()
    named = [word for word in section.fsdp if word in STRATEGIES]
    strategy = config.sharding_strategy or (named[0] if named else "full_shard")
    notes = []
    if (section.fsdp_version or config.version) == 1:
        notes.append("fsdp_version 1: FSDP2 does the same with these keys, and is used.")
    if strategy == "no_shard":
        return None, (*notes, "fsdp no_shard is DDP: each rank holds a whole copy.")
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
    if config.mixed_precision_policy == "bf16" and precision != "bf16":
        raise PlanError(
            f"fsdp_config.mixed_precision_policy is bf16, but the run computes in {precision}. "
            "Write `bf16: true`, or remove mixed_precision_policy."
        )
    reshards = strategy in ("full_shard", "hybrid_shard")
    return FsdpPlan(
        num_shards=shards,
        num_replicas=replicas,
        reshard_after_forward=reshards if config.reshard_after_forward is None else config.reshard_after_forward,
        offload=config.offload_params or "offload" in section.fsdp,
        pin_memory=config.cpu_offload_pin_memory and world.device == "cuda",
        layer_classes=config.transformer_layer_cls_to_wrap,
        wraps_layers=config.auto_wrap_policy != "NO_WRAP",
        main_rank_reads=config.cpu_ram_efficient_loading,
        sharded_checkpoints=config.state_dict_type == "SHARDED_STATE_DICT",
        forward_prefetch=config.forward_prefetch,
        gathers_bf16=precision == "bf16" and config.mixed_precision_policy != "fp32",
    ), tuple(notes)


def _mesh_sizes(section: ShardingSection, world: World, *, hybrid: bool) -> tuple[int, int]:
    """Ranks that share one copy, and copies. Where no size is given, hybrid_shard keeps one copy on each node."""
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


# "auto" of these follows the model's width; the formulas are those of transformers' DeepSpeed integration.
HIDDEN_SIZE_KEYS = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}


def _plan_zero(
    given: str | Mapping[str, Any],
    world: World,
    precision: Precision,
    micro_batch: int,
    grad_accum: int,
    max_grad_norm: float,
) -> ZeroPlan:
    if importlib.util.find_spec("deepspeed") is None:
        raise PlanError("`deepspeed` needs the package of that name: pip install 'finetuner[deepspeed]'.")
    where = given if isinstance(given, str) else "deepspeed"
    config: dict[str, Any] = json.loads(json.dumps(read_deepspeed(given)))  # a copy, all the way down
    if "bfloat16" in config:  # DeepSpeed's older name
        config["bf16"] = config.pop("bfloat16")
    filled_in = tuple(".".join(path) for path in _autos(config))
    ours = {
        "train_batch_size": (micro_batch * grad_accum * world.size, "ranks x micro-batch x accumulation"),
        "train_micro_batch_size_per_gpu": (micro_batch, "micro_batch_size"),
        "gradient_accumulation_steps": (grad_accum, "gradient_accumulation_steps"),
        "gradient_clipping": (max_grad_norm, "max_grad_norm"),
    }
    for key, (value, meaning) in ours.items():
        written = config.get(key, "auto")
        if written != "auto" and written != value:
            raise PlanError(
                f"{where}: {key} is {written}, but the recipe's {meaning} is {value}.\n"
                f'Write "auto" there, or change the recipe.'
            )
        config[key] = value
    for name in ("bf16", "fp16"):
        block = dict(config.get(name) or {})
        written, value = block.get("enabled", "auto"), precision == name
        if written != "auto" and written is not value:
            raise PlanError(
                f"{where}: {name}.enabled is {json.dumps(written)}, but the run computes in {precision} "
                f'(the recipe\'s bf16 and fp16, and this device).\nWrite "auto" there, or `{name}: '
                f"{json.dumps(written)}` in the recipe."
            )
        config[name] = {**block, "enabled": True} if value else {"enabled": False}
    if config["bf16"]["enabled"]:
        config["bf16"]["check_grad_overflow"] = True  # a NaN in the gradient skips the step instead of the weights
    config["zero_allow_untested_optimizer"] = True  # the optimizer is ours
    config["zero_force_ds_cpu_optimizer"] = False
    left = [path for path in _autos(config) if path[-1] not in HIDDEN_SIZE_KEYS]
    if left:
        raise PlanError(f'{where}: {".".join(left[0])} is "auto", which nothing here can fill in. Write its value.')
    stage = config["zero_optimization"]["stage"]
    return ZeroPlan(stage=stage, num_shards=world.size, config=config, filled_in=filled_in)


def zero_config_for(plan: ZeroPlan, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration with nothing left to fill in."""
    config: dict[str, Any] = json.loads(json.dumps(plan.config))
    zero = config["zero_optimization"]
    for key, formula in HIDDEN_SIZE_KEYS.items():
        if zero.get(key) == "auto":
            zero[key] = formula(hidden_size)
    assert not list(_autos(config))
    return config


def filled_in(plan: ZeroPlan, hidden_size: int) -> str:
    """What became of each "auto": "gradient_clipping 1.0, bf16.enabled true"; empty if there was none."""
    config = zero_config_for(plan, hidden_size)

    def value(name: str) -> Any:
        found: Any = config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    return ", ".join(f"{name} {json.dumps(value(name))}" for name in plan.filled_in)


def _autos(block: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in block.items():
        if isinstance(value, Mapping):
            found += _autos(value, (*path, key))
        elif value == "auto":
            found.append((*path, key))
    return found


def refuse_another_launch_config(
    launch: Launch,
    asked: str | None,
    engine: EnginePlan,
    precision: Precision,
    deepspeed: str | Mapping[str, Any] | None,
) -> None:
    """`accelerate launch --config_file` may say how to shard as well. Raises PlanError where it says something else."""
    source = "the configuration of accelerate launch"
    if launch.engine is not None and launch.engine != asked:
        advice = {
            "fsdp": "Add `fsdp: [full_shard, auto_wrap]` to the recipe",
            "deepspeed": "Add `deepspeed: deepspeed_configs/zero2.json` to the recipe",
        }[launch.engine]
        says = f"`{asked}`" if asked else "neither fsdp nor deepspeed"
        raise PlanError(f"{source} asks for {launch.engine}, the recipe has {says}.\n{advice}, or launch without it.")
    if launch.mixed_precision in ("bf16", "fp16") and launch.mixed_precision != precision:
        raise PlanError(
            f"{source} says mixed_precision: {launch.mixed_precision}, but by the recipe and this device the run "
            f"computes in {precision}.\nWrite `{launch.mixed_precision}: true` in the recipe, or mixed_precision: 'no' "
            "there."
        )
    differences: list[tuple[str, object, object]] = []
    if isinstance(engine, FsdpPlan) and launch.engine == "fsdp":
        there = launch.settings
        for key, value in (
            ("fsdp_offload_params", engine.offload),
            ("fsdp_cpu_ram_efficient_loading", engine.main_rank_reads or None),
            ("fsdp_reshard_after_forward", engine.reshard_after_forward),
            ("fsdp_state_dict_type", "SHARDED_STATE_DICT" if engine.sharded_checkpoints else "FULL_STATE_DICT"),
            ("fsdp_transformer_layer_cls_to_wrap", ",".join(engine.layer_classes) or None),
            ("dp_replicate_size", str(engine.num_replicas)),
            ("dp_shard_size", str(engine.num_shards)),
        ):
            shown = str(value).lower() if isinstance(value, bool) else value
            if value is not None and there.get(key, shown) != shown:
                differences.append((key, there[key], shown))
    if isinstance(engine, ZeroPlan) and launch.engine == "deepspeed":
        file = launch.settings.get("deepspeed_config_file")
        if file is not None:
            assert deepspeed is not None
            if read_deepspeed(file) != read_deepspeed(deepspeed):
                named = deepspeed if isinstance(deepspeed, str) else "a block of its own"
                differences.append(("deepspeed_config_file", file, named))
        elif launch.settings.get("zero_stage", str(engine.stage)) != str(engine.stage):
            differences.append(("zero_stage", launch.settings["zero_stage"], engine.stage))
    if differences:
        lines = "\n  ".join(f"{key}: {other} there, {here} by the recipe" for key, other, here in differences)
        raise PlanError(f"{source} contradicts the recipe:\n  {lines}\nMake them the same, or launch without it.")
