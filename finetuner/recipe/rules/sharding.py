"""Rules about FSDP and DeepSpeed."""

from collections.abc import Iterator, Mapping
from itertools import chain, pairwise
from typing import Any

from finetuner.errors import RecipeError
from finetuner.recipe.deepspeed import deepspeed_mistakes, read_deepspeed
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.sections.sharding import ENGINE_KEYS, STRATEGIES, asks


def _one_engine(values: Values) -> Iterator[Finding]:
    asked = [[key for key in keys if asks(values[key])] for keys in ENGINE_KEYS.values()]
    for (one, *_), (other, *_) in pairwise(keys for keys in asked if keys):
        message = f"{one} and {other} are both given: they are two ways to shard the same model. Remove one."
        yield Finding((one,), message, ((other,),))


def _one_strategy(values: Values) -> Iterator[Finding]:
    words, config = values["fsdp"], values["fsdp_config"]
    named = [word for word in words if word in STRATEGIES]
    if len(named) > 1:
        yield Finding(("fsdp",), f"fsdp names {len(named)} strategies: {', '.join(named)}. Keep one.")
    elif words and not named:
        yield Finding(("fsdp",), "fsdp names no strategy. Write `fsdp: [full_shard, auto_wrap]`.")
    also = config.sharding_strategy if config is not None else None
    if also is not None and named and also != named[0]:
        message = f"fsdp says {named[0]}, fsdp_config.sharding_strategy says {also}. Remove one."
        yield Finding(("fsdp_config",), message, (("fsdp",),))


def _copies_are_not_offloaded(values: Values) -> Iterator[Finding]:
    words, config = values["fsdp"], values["fsdp_config"]
    offloads = "offload" in words or (config is not None and config.offload_params)
    chosen = config.sharding_strategy if config is not None else None
    chosen = chosen or next((word for word in words if word in STRATEGIES), None)
    if chosen == "no_shard" and offloads:
        yield Finding(("fsdp",), "no_shard keeps a full copy on each rank, which cannot be offloaded. Use full_shard.")


def _details_agree(values: Values) -> Iterator[Finding]:
    words, config = values["fsdp"], values["fsdp_config"]
    if config is None:
        return
    if config.auto_wrap_policy == "NO_WRAP" and ("auto_wrap" in words or config.transformer_layer_cls_to_wrap):
        message = "auto_wrap_policy NO_WRAP gathers the whole model at once, auto_wrap and class names do not."
        yield Finding(("fsdp_config",), message + " Remove one.", (("fsdp",),))
    if config.sync_module_states is False and config.cpu_ram_efficient_loading:
        message = "with cpu_ram_efficient_loading only rank 0 has the weights: sync_module_states cannot be false."
        yield Finding(("fsdp_config",), message)


def _one_version(values: Values) -> Iterator[Finding]:
    config, version = values["fsdp_config"], values["fsdp_version"]
    if version is None:
        return
    if not values["fsdp"] and config is None:
        yield Finding(("fsdp_version",), "fsdp_version has no effect without `fsdp`. Add fsdp, or remove this line.")
    elif config is not None and config.version not in (None, version):
        message = f"fsdp_version is {version}, fsdp_config.version is {config.version}. Remove one."
        yield Finding(("fsdp_version",), message, (("fsdp_config",),))


def _sizes_are_of_shards(values: Values) -> Iterator[Finding]:
    if values["fsdp"] or values["fsdp_config"] is not None:
        return
    for key in ("dp_replicate_size", "dp_shard_size"):
        if (values[key] or 1) > 1:
            message = f"{key} is for FSDP: add `fsdp: [full_shard, auto_wrap]`, or remove this line."
            yield Finding((key,), message)


def deepspeed_findings(raw: Mapping[str, Any], *, check_files: bool) -> Iterator[Finding]:
    """Yield the mistakes in DeepSpeed's configuration: the recipe's block, or its file if files are checked."""
    given = raw.get("deepspeed")
    if isinstance(given, str) and not check_files:
        return
    if not isinstance(given, str | dict):
        return
    try:
        config = read_deepspeed(given)
    except RecipeError as error:
        yield Finding(("deepspeed",), str(error))
        return
    for path, message in deepspeed_mistakes(config):
        if isinstance(given, str):
            yield Finding(("deepspeed",), f"{given}: {message}")
        else:
            yield Finding(("deepspeed", *path), message)


RULES: tuple[Rule, ...] = (
    (tuple(chain(*ENGINE_KEYS.values())), _one_engine),
    (("fsdp", "fsdp_config"), _one_strategy),
    (("fsdp", "fsdp_config"), _copies_are_not_offloaded),
    (("fsdp", "fsdp_config"), _details_agree),
    (("fsdp", "fsdp_config", "fsdp_version"), _one_version),
    (("fsdp", "fsdp_config", "dp_replicate_size", "dp_shard_size"), _sizes_are_of_shards),
)
