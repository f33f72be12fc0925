"""The layout of a model over the ranks of a run, as one frozen value: degrees, what each rank keeps, what is offloaded.

Derived from the recipe and the world, without torch. The engines in `parallel/` carry it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetuner.errors import PlanError
from finetuner.plan.precision import Precision
from finetuner.recipe.sections import ShardingSection
from finetuner.recipe.sections.sharding import ENGINE_KEYS
from finetuner.world import World

EngineName = Literal["replicated", "fsdp", "zero"]


@dataclass(frozen=True)
class ParallelRequest:
    """Arguments of an engine's `plan`, in plan/<engine>.py: the recipe's keys, and the parts of the plan that it reads.

    `max_grad_norm`: to which gradients are clipped; 0: they are not.
    """

    section: ShardingSection
    world: World
    precision: Precision
    micro_batch: int
    grad_accum: int
    max_grad_norm: float


@dataclass(frozen=True)
class FsdpOptions:
    """Options of FSDP2 (torch's `fully_shard`) beside the degrees.

    `layer_classes`: classes whose modules are gathered one at a time; empty: those that the model names.
    `gathers_bf16`: trained weights travel, and compute, in bf16.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    pin_memory: bool = True
    layer_classes: tuple[str, ...] = ()
    wraps_layers: bool = True
    main_rank_reads: bool = False
    sharded_checkpoints: bool = False
    forward_prefetch: bool = False
    gathers_bf16: bool = False


@dataclass(frozen=True)
class ZeroOptions:
    """DeepSpeed's stage and configuration, every "auto" filled in but those that need the model's width.

    `filled_in`: dotted names of what the user left as "auto". See zero_config_for in plan/zero.py.
    """

    stage: int
    config: Mapping[str, Any] = field(repr=False)
    filled_in: tuple[str, ...] = ()

    @property
    def offload(self) -> bool:
        zero = self.config["zero_optimization"]
        blocks = (zero.get("offload_optimizer"), zero.get("offload_param"))
        return any((block or {}).get("device", "none") != "none" for block in blocks)


@dataclass(frozen=True)
class ParallelPlan:
    """Degrees whose product is the number of ranks, from the outermost to the innermost:

        replicate   copies of the model (data parallel)
        shard       ranks that share one copy and see different rows (data parallel)
        context     ranks that share the positions of one row
        tensor      ranks that share the matrices of one layer

    `context` and `tensor` are 1 until an engine can do more; what they mean for the order of ranks holds already.
    The default is one rank with everything. Of `fsdp` and `zero` the one of the engine is given.
    """

    engine: EngineName = "replicated"
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    fsdp: FsdpOptions | None = None
    zero: ZeroOptions | None = None

    def __post_init__(self) -> None:
        assert (self.engine == "fsdp") == (self.fsdp is not None), "the options are those of the engine"
        assert (self.engine == "zero") == (self.zero is not None), "the options are those of the engine"
        assert self.engine != "replicated" or self.shard == 1, "copies are not sharded"

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data_parallel(self) -> int:
        """Number of ranks, or groups of ranks, that see different rows."""
        return self.replicate * self.shard

    def data_parallel_rank(self, world_rank: int) -> int:
        """Return which share of a batch a rank of the world takes: the ranks of one row count as one."""
        return world_rank // (self.context * self.tensor)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all: one rank, or DDP."""
        return self.engine == "replicated"

    @property
    def shards_weights(self) -> bool:
        return self.engine == "fsdp" or (self.zero is not None and self.zero.stage == 3)

    @property
    def shards_gradients(self) -> bool:
        return self.engine == "fsdp" or (self.zero is not None and self.zero.stage >= 2)

    @property
    def shards_optimizer(self) -> bool:
        return not self.is_replicated

    @property
    def offloads_weights(self) -> bool:
        """Whether weights and gradients live in the node's RAM between steps, for certain."""
        return self.fsdp is not None and self.fsdp.offload

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer updates in the node's RAM, on the CPU."""
        options = self.fsdp or self.zero
        return options is not None and options.offload

    @property
    def casts_full_model(self) -> bool:
        """Whether the engine casts all weights to the run's 16-bit format and updates fp32 copies (DeepSpeed)."""
        return self.engine == "zero"

    @property
    def main_rank_reads(self) -> bool:
        """Whether one rank reads the base model and hands it out (FSDP's cpu_ram_efficient_loading)."""
        return self.fsdp is not None and self.fsdp.main_rank_reads

    @property
    def sharded_checkpoints(self) -> bool:
        """Whether every rank writes its own file of a checkpoint."""
        return self.fsdp is not None and self.fsdp.sharded_checkpoints

    @property
    def recipe_word(self) -> str | None:
        """The recipe's key for the engine, as rules and other packages name it: "fsdp", "deepspeed" or None."""
        return None if self.is_replicated else ENGINE_KEYS[self.engine][0]

    @property
    def name(self) -> str:
        """The layout in words, such as "FSDP2 over 2 copies x 4 ranks, offloaded to the CPU"."""
        if self.is_replicated:
            return "one rank" if self.world_size == 1 else f"DDP over {self.world_size} ranks"
        offloaded = ", offloaded to the CPU" if self.offloads_optimizer else ""
        if self.zero is not None:
            return f"ZeRO-{self.zero.stage} over {ranks(self.shard)}{offloaded}"
        assert self.fsdp is not None
        over = f"{self.replicate} copies x {ranks(self.shard)}" if self.replicate > 1 else ranks(self.shard)
        stays = "" if self.fsdp.reshard_after_forward else ", gathered weights kept until the backward is done"
        return f"FSDP2 over {over}{stays}{offloaded}"

    def require_supported(self, *, precision: str, device: str) -> None:
        """Raise PlanError for a precision or device that the engine does not have."""
        if self.is_replicated:
            return
        if precision == "fp16":
            raise PlanError(
                f"fp16 is supported on one GPU and with DDP, not with {self.recipe_word}. "
                "Write `bf16: true` and `fp16: false`."
            )
        if device == "mps":
            raise PlanError(
                f"{self.recipe_word} needs GPUs of NVIDIA or AMD, or CPU ranks; this is {device}. Remove it."
            )


def ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"
