"""Sharding of a model over ranks: FSDP and DeepSpeed."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from finetuner.recipe.sections.base import Count, DiskName, Seconds, Section
from finetuner.recipe.sections.facts import FREE

FsdpWord = Literal[
    "full_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2", "no_shard", "auto_wrap", "offload"
]
STRATEGIES = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")

# Engine, which is a module of plan/ and one of parallel/ -> the keys that ask for it, the one that names it first.
ENGINE_KEYS: dict[str, tuple[str, ...]] = {"fsdp": ("fsdp", "fsdp_config"), "zero": ("deepspeed",)}


def asks(value: object) -> bool:
    """Return whether the value of a key in ENGINE_KEYS asks for its engine."""
    return value not in (None, (), [])


def _words(value: Any) -> Any:
    """FSDP1 wrote them as one text as well: "full_shard auto_wrap"."""
    if isinstance(value, str):
        value = re.split(r"[\s,]+", value.strip())
    return [word.lower() if isinstance(word, str) else word for word in value] if isinstance(value, list) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


StateDictType = Annotated[Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"], BeforeValidator(_upper)]


class FsdpConfig(Section):
    """Details of FSDP. In a recipe every key may carry the prefix fsdp_, as accelerate writes them."""

    version: Literal[1, 2] | None = Field(
        None, description="FSDP2 is used either way; 1 says that the keys are FSDP1's."
    )
    offload_params: bool = Field(False, description="Keep parameters, gradients and optimizer in the CPU's memory.")
    cpu_offload_pin_memory: bool = Field(True, description="Pin what is offloaded: faster copies, more locked memory.")
    cpu_ram_efficient_loading: bool = Field(
        False, description="Only rank 0 reads the model and sends each rank its shard; else every rank reads all of it."
    )
    state_dict_type: StateDictType = Field(
        "FULL_STATE_DICT",
        description="Checkpoints as one file that rank 0 writes, or (SHARDED_STATE_DICT) each rank's shard by itself.",
    )
    final_state_dict_type: Annotated[Literal["FULL_STATE_DICT"], BeforeValidator(_upper)] = Field(
        "FULL_STATE_DICT", description="The result of a run is always ordinary safetensors."
    )
    auto_wrap_policy: Annotated[Literal["TRANSFORMER_BASED_WRAP", "NO_WRAP"], BeforeValidator(_upper)] = Field(
        "TRANSFORMER_BASED_WRAP",
        description="The unit that is gathered: a transformer layer, or (NO_WRAP) the full model.",
    )
    transformer_layer_cls_to_wrap: Annotated[tuple[str, ...], Strict(False), BeforeValidator(_names)] = Field(
        (), description="Classes of the layers that are gathered one by one; default: what the model itself names."
    )
    sharding_strategy: Annotated[
        Literal["full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2"] | None,
        BeforeValidator(_lower),
    ] = Field(None, description="FSDP1's name for the first word of `fsdp`.")
    reshard_after_forward: bool | None = Field(
        None, description="Free a layer's gathered weights after its forward; default: as the strategy says."
    )
    activation_checkpointing: bool = Field(False, description="The same as gradient_checkpointing.")
    forward_prefetch: bool = Field(False, description="Gather the next layer while this one computes.")
    mixed_precision_policy: Literal["bf16", "fp32"] | None = Field(
        None, description="Number format in which weights that are trained are gathered; default: that of the run."
    )
    # What FSDP2 always does. The other value of each is refused, not ignored.
    backward_prefetch: Annotated[Literal["BACKWARD_PRE"], BeforeValidator(_upper)] = Field(
        "BACKWARD_PRE", description="FSDP2 always gathers the next layer of the backward pass early."
    )
    use_orig_params: Literal[True] = Field(True, description="FSDP2 always keeps the parameters as they are.")
    limit_all_gathers: Literal[True] = Field(True, description="FSDP2 always bounds what it gathers ahead.")
    sync_module_states: bool | None = Field(
        None, description="All ranks start from the same weights, whatever this says."
    )


class ShardingSection(Section):
    """Sharding of the model over ranks. With neither fsdp nor deepspeed, each rank has a copy (DDP)."""

    fsdp: Annotated[tuple[FsdpWord, ...], Strict(False), BeforeValidator(_words), FREE] = Field(
        (),
        description="full_shard (parameters, gradients, optimizer), shard_grad_op (gathered weights stay until the "
        "backward is done), hybrid_shard (within a node, copies between nodes), with auto_wrap and offload.",
    )
    fsdp_config: Annotated[FsdpConfig | None, FREE] = Field(None, description="Details of FSDP.")
    fsdp_version: Annotated[Literal[1, 2] | None, FREE] = Field(None, description="The same as fsdp_config.version.")
    dp_replicate_size: Annotated[Count | None, FREE] = Field(
        None, description="Copies of the sharded model; default: one, and with hybrid_shard one for each node."
    )
    dp_shard_size: Annotated[Count | None, FREE] = Field(
        None, description="Ranks that share one copy; default: all, and with hybrid_shard those of a node."
    )
    # the others wait while the main rank writes and hashes a checkpoint: 84 GB for 7B parameters
    ddp_timeout: Annotated[Seconds, FREE] = Field(
        3600.0, description="How long a rank waits for the others before the run is given up; a checkpoint takes less."
    )
    deepspeed: Annotated[DiskName | dict[str, Any] | None, FREE] = Field(
        None, description='A DeepSpeed JSON file, or its contents as a block; "auto" in it is filled in from here.'
    )

    @property
    def engine(self) -> str:
        """The engine that is asked for, a key of ENGINE_KEYS; "replicated" if none is."""
        asked = (engine for engine, keys in ENGINE_KEYS.items() if any(asks(getattr(self, key)) for key in keys))
        return next(asked, "replicated")
