"""The learning rate and the state of an optimizer, as named tensors: of torch's optimizers and others of their kind."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetuner.errors import CheckpointError
from finetuner.parallel.torchao_internals import is_torchao, load_local_state, local_state

# Prefix of a state that ZeRO keeps in blocks of 8 bits: it belongs to a rank's shard, and to no parameter.
OF_RANKS = "zero rank "
# The same of torchao's states under FSDP2: a parameter's blocks begin where a rank's shard of it begins.
OF_SHARDS = "fsdp rank "


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one, each over its own parameters.

    Groups and states are read from these optimizers, never copied.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, its in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(its)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: the schedule's, times the group's own multiple if it has one."""
    for group in optimizer.param_groups:
        its = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):  # of torchao, whose compiled step takes it as an input
            group["lr"].fill_(its)
        else:
            group["lr"] = its


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, on_cpu: bool = True
) -> dict[str, torch.Tensor]:
    """Return "parameter name::state name" -> tensor, in the shape of the parameter or of its shard, or a scalar.

    Learning rates and decays are the recipe's and not among them.
    """
    tensors: dict[str, torch.Tensor] = {}
    torchao = torchao_part(optimizer)
    if torchao is not None:
        for name, parameter in parameters.items():
            mine = local_state(torchao, parameter)
            its = {f"{shard_name(parameter)}{name}::{key}": tensor for key, tensor in mine.items()}
            tensors |= {key: tensor.cpu().contiguous() if on_cpu else tensor for key, tensor in its.items()}
        return tensors
    states = optimizer.state
    for name, parameter in parameters.items():
        for key, value in states.get(parameter, {}).items():
            tensor = as_tensor(value)
            if key.startswith("qmap"):  # one table for all parameters; a file holds no two tensors in one memory
                tensor = tensor.clone()
            tensors[f"{name}::{key}"] = tensor.cpu().contiguous() if on_cpu else tensor
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the tensors that optimizer_tensors gave, in its shapes.

    Raises KeyError for a parameter that the optimizer does not have, and CheckpointError for a state that cannot be
    told apart by parameters.
    """
    torchao = torchao_part(optimizer)
    if torchao is not None:
        _load_blocks(torchao, parameters, tensors)
        return
    if any(name.startswith((OF_RANKS, OF_SHARDS)) for name in tensors):
        raise cannot_reshard_blocks(next(iter(tensors)), "another engine")
    _require_owned(optimizer, parameters, tensors)
    for part in optimizer.parts if isinstance(optimizer, CombinedOptimizer) else (optimizer,):
        numbers = {id(p): i for i, p in enumerate(p for group in part.param_groups for p in group["params"])}
        state: dict[int, dict[str, torch.Tensor | int]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("::")
            number = numbers.get(id(parameters[parameter]))
            if number is not None:
                state.setdefault(number, {})[key] = as_value(tensor)
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def torchao_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Return the optimizer of torchao that this one is or steps, if it is one."""
    parts = optimizer.parts if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    return parts[0] if is_torchao(parts[0]) else None


def shard_name(parameter: torch.Tensor) -> str:
    """Return the prefix of the states of this rank's shard of a parameter (any shape); "" of a full one."""
    if not isinstance(parameter, DTensor):
        return ""
    place = parameter.device_mesh.get_coordinate()
    assert place is not None
    return f"{OF_SHARDS}{place[-1]} of {parameter.device_mesh.shape[-1]}, "


def _load_blocks(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the states of torchao's optimizer. Raises CheckpointError if others were sharded than these are."""
    here = {name: f"{shard_name(parameter)}{name}" for name, parameter in parameters.items()}
    wanted, stored = {mine: name for name, mine in here.items()}, dict[str, dict[str, torch.Tensor]]()
    for key in tensors:
        owner, _, state_name = key.rpartition("::")
        if owner in wanted:
            stored.setdefault(wanted[owner], {})[state_name] = tensors[key]
    if tensors and len(stored) < len(parameters):
        raise cannot_reshard_blocks(next(iter(tensors)), "these ranks")
    for name, its in stored.items():
        try:
            load_local_state(optimizer, parameters[name], its)
        except ValueError as error:
            raise cannot_reshard_blocks(f"{here[name]}::", "these ranks") from error


def _require_owned(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Assert that no state (any shape) is of a parameter that the optimizer lacks: it would go on without it."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name in tensors if id(parameters[name.rpartition("::")[0]]) not in owned]
    assert not lost, f"the optimizer would go on without the state of {lost[0]} and {len(lost) - 1} more"


def as_tensor(value: Any) -> torch.Tensor:
    """Return a state as a tensor: one of any shape as it is, a number as a scalar."""
    return torch.as_tensor(value).detach()  # bitsandbytes and transformers count their steps in a plain int


def as_value(tensor: torch.Tensor) -> torch.Tensor | int:
    """Return the state that as_tensor was given: a number for an integer scalar, else the tensor (any shape)."""
    return int(tensor) if tensor.dtype == torch.int64 and tensor.ndim == 0 else tensor


def cannot_reshard_blocks(name: str, here: str) -> CheckpointError:
    """Return the error for a state in blocks, written under `name`, that another way of sharding cannot take over."""
    where = "an engine that does not shard the optimizer"
    if name.startswith(OF_RANKS):
        where = name.rpartition("::")[0]
    elif name.startswith(OF_SHARDS):
        where = name.partition(", ")[0]
    return CheckpointError(
        f"the optimizer's state in this checkpoint is in blocks of 8 or 4 bits, as {where} held it, and cannot be "
        f"divided again for {here}.\nGo on with the engine and the number of ranks that wrote it, or give its weights "
        "to a new run as base_model (or lora_model_dir)."
    )
