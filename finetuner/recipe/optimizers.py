"""The optimizers by name: which arguments each takes, and which engines can spread its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "adafactor", "muon", "sgd", "rmsprop", "adagrad",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """`arguments`: what optim_args may name -> its type. `uses_betas`: adam_beta1 and adam_beta2 mean something.

    `not_sharded`: engine ("fsdp", "deepspeed") -> why it cannot spread this optimizer's state.
    """

    arguments: Mapping[str, type] = field(default_factory=dict)
    not_sharded: Mapping[str, str] = field(default_factory=dict)
    uses_betas: bool = True
    uses_epsilon: bool = True


_ADAMW = Kind({"amsgrad": bool})
# bitsandbytes' kernels know no DTensor, which is what FSDP2 makes of a parameter.
_THEIR_KERNELS = {"fsdp": "its kernels cannot work on FSDP's parts"}
_BLOCKS = Kind({"min_8bit_size": int}, {"fsdp": "it keeps a state that FSDP cannot shard"})
_LION_BLOCKS = Kind(_BLOCKS.arguments, _BLOCKS.not_sharded, uses_epsilon=False)

OPTIMIZERS: dict[str, Kind] = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": _ADAMW,
    "adamw_bnb_8bit": _BLOCKS,
    "paged_adamw_8bit": _BLOCKS,
    "paged_adamw_32bit": Kind(not_sharded=_THEIR_KERNELS),
    "lion_32bit": Kind(not_sharded=_THEIR_KERNELS, uses_epsilon=False),
    "lion_8bit": _LION_BLOCKS,
    "paged_lion_32bit": Kind(not_sharded=_THEIR_KERNELS, uses_epsilon=False),
    "paged_lion_8bit": _LION_BLOCKS,
    "adafactor": Kind(
        {"beta1": float, "clip_threshold": float, "decay_rate": float, "eps": list, "scale_parameter": bool},
        dict.fromkeys(("fsdp", "deepspeed"), "it keeps a mean for each row and column of a whole matrix"),
        uses_betas=False,
        uses_epsilon=False,
    ),
    "muon": Kind(
        {"momentum": float, "nesterov": bool, "ns_steps": int, "adjust_lr_fn": str},
        dict.fromkeys(("fsdp", "deepspeed"), "it needs whole matrices"),
    ),
    "sgd": Kind({"momentum": float, "dampening": float, "nesterov": bool}, uses_betas=False, uses_epsilon=False),
    "rmsprop": Kind({"alpha": float, "momentum": float, "centered": bool}, uses_betas=False),
    "adagrad": Kind(
        {"lr_decay": float, "initial_accumulator_value": float},
        {"deepspeed": "DeepSpeed builds another in its place"},
        uses_betas=False,
    ),
}
assert tuple(OPTIMIZERS) == get_args(OptimizerName)


def read_arguments(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """optim_args as a block, or as one text: "momentum=0.9,nesterov=true". Raises ValueError for another text."""
    if not isinstance(given, str):
        return dict(given)
    arguments: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in given.split(","))):
        key, equals, text = (word.strip() for word in part.partition("="))
        if not (key and equals and text):
            raise ValueError(part)
        arguments[key] = _value(text)
    return arguments


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# What a type is called in an error.
WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list of numbers", str: "text"}


def fits(value: Any, kind: type) -> bool:
    """A whole number is a number; true is none."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, list | tuple) and all(fits(v, float) for v in value)
    return isinstance(value, kind)
