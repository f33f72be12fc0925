"""DeepSpeed's JSON -> its ZeRO on this world, with every "auto" filled in from the plan or the model."""

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from finetuner.errors import PlanError
from finetuner.plan.parallel import ParallelPlan, ParallelRequest, ZeroOptions
from finetuner.plan.precision import Precision
from finetuner.recipe.deepspeed import read_deepspeed

# "auto" of these follows the model's width; the formulas are those of transformers' DeepSpeed integration.
HIDDEN_SIZE_KEYS = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}


def plan(request: ParallelRequest) -> tuple[ParallelPlan, tuple[str, ...]]:
    """Return the layout that the recipe's DeepSpeed configuration, a file or a block, asks for; and no notes.

    Raises PlanError if DeepSpeed is missing, or its configuration contradicts the recipe.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise PlanError("`deepspeed` needs the package of that name: pip install 'finetuner[deepspeed]'.")
    given, world, precision = request.section.deepspeed, request.world, request.precision
    assert given is not None
    where = given if isinstance(given, str) else "deepspeed"
    config: dict[str, Any] = json.loads(json.dumps(read_deepspeed(given)))  # a copy, all the way down
    if "bfloat16" in config:  # DeepSpeed's older name
        config["bf16"] = config.pop("bfloat16")
    filled_in = tuple(".".join(path) for path in _autos(config))
    from_recipe = {
        "train_batch_size": (
            request.micro_batch * request.grad_accum * world.size,
            "ranks x micro-batch x accumulation",
        ),
        "train_micro_batch_size_per_gpu": (request.micro_batch, "micro_batch_size"),
        "gradient_accumulation_steps": (request.grad_accum, "gradient_accumulation_steps"),
        "gradient_clipping": (request.max_grad_norm, "max_grad_norm"),
    }
    for key, (value, meaning) in from_recipe.items():
        config[key] = _agreed(config.get(key, "auto"), value, f"{where}: {key}", meaning)
    for name in ("bf16", "fp16"):
        config[name] = _precision_block(config.get(name), name, precision, where)
    if config["bf16"]["enabled"]:
        config["bf16"]["check_grad_overflow"] = True  # a NaN in the gradient skips the step instead of the weights
    config["zero_allow_untested_optimizer"] = True  # the optimizer is ours
    config["zero_force_ds_cpu_optimizer"] = False
    left = [path for path in _autos(config) if path[-1] not in HIDDEN_SIZE_KEYS]
    if left:
        raise PlanError(f'{where}: {".".join(left[0])} is "auto", which nothing here can fill in. Write its value.')
    options = ZeroOptions(stage=config["zero_optimization"]["stage"], config=config, filled_in=filled_in)
    return ParallelPlan("zero", shard=world.size, zero=options), ()


def _agreed(written: Any, value: float, where: str, meaning: str) -> float:
    """Return the recipe's value. Raises PlanError if the file has another one."""
    if written != "auto" and written != value:
        raise PlanError(
            f'{where} is {written}, but the recipe\'s {meaning} is {value}.\nWrite "auto" there, or change the recipe.'
        )
    return value


def _precision_block(given: Any, name: str, precision: Precision, where: str) -> dict[str, Any]:
    """Return DeepSpeed's block `name` (bf16 or fp16) for the run's precision. Raises PlanError if it says otherwise."""
    block = dict(given or {})
    written, value = block.get("enabled", "auto"), precision == name
    if written != "auto" and written is not value:
        raise PlanError(
            f"{where}: {name}.enabled is {json.dumps(written)}, but the run computes in {precision} "
            f'(the recipe\'s bf16 and fp16, and this device).\nWrite "auto" there, or `{name}: '
            f"{json.dumps(written)}` in the recipe."
        )
    return {**block, "enabled": True} if value else {"enabled": False}


def zero_config_for(options: ZeroOptions, hidden_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration with nothing left to fill in. `hidden_size`: the model's width."""
    config: dict[str, Any] = json.loads(json.dumps(options.config))
    zero = config["zero_optimization"]
    for key, formula in HIDDEN_SIZE_KEYS.items():
        if zero.get(key) == "auto":
            zero[key] = formula(hidden_size)
    assert not list(_autos(config))
    return config


def filled_in(options: ZeroOptions, hidden_size: int) -> str:
    """Return the value of each former "auto", as "gradient_clipping 1.0, bf16.enabled true", or an empty text."""
    config = zero_config_for(options, hidden_size)

    def value(name: str) -> Any:
        found: Any = config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    return ", ".join(f"{name} {json.dumps(value(name))}" for name in options.filled_in)


def _autos(block: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all keys whose value is "auto"."""
    found: list[tuple[str, ...]] = []
    for key, value in block.items():
        if isinstance(value, Mapping):
            found += _autos(value, (*path, key))
        elif value == "auto":
            found.append((*path, key))
    return found
