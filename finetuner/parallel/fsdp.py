"""FSDP2: torch's `fully_shard` on the module that holds the loss, so that the head is gathered where it is used.

`fully_shard` is called directly and not through Accelerate, which has no FSDP on CPU ranks (it runs DDP and says
nothing), casts a whole model to fp32 before it shards it, and wants one dtype for a frozen bf16 base and the fp32
adapter on it. Gradients are reduced in every micro-batch: whole gradients of a model that has to be sharded would not
fit.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finetuner.errors import ModelError
from finetuner.models.lazy_weights import LazyWeights
from finetuner.objectives.next_token import TokenLoss
from finetuner.parallel.engine import Held, Tensors, held_by
from finetuner.parallel.optimizer_state import load_optimizer_tensors, optimizer_tensors, set_learning_rate
from finetuner.plan.parallel import FsdpPlan


def shard_module(
    loss: TokenLoss, plan: FsdpPlan, device: torch.device, *, full: bool, promises: LazyWeights | None = None
) -> None:
    """Replace every parameter of `loss` by this rank's part of it, in place. Build the optimizer only after this.

    `full`: whether the whole model is trained. With `plan.main_rank_reads` or `promises`, only the values of rank 0
    count: it reads what is promised, and hands each rank its part.
    """
    mesh = _mesh(plan, device)
    promised = {} if promises is None else promises.take_unread(loss)
    main_reads = plan.main_rank_reads or promises is not None
    values: Tensors = {}
    if main_reads:
        _share_buffers(loss, device)
        if distributed.get_rank() == 0:
            values = {name: p.detach() for name, p in loss.named_parameters() if name not in promised}
    offload = CPUOffloadPolicy(pin_memory=plan.pin_memory) if plan.offload else OffloadPolicy()
    # A frozen base keeps its own dtype, and an adapter its fp32: what is trained alone is cast.
    dtypes = torch.bfloat16 if plan.gathers_bf16 and full else None
    policy = MixedPrecisionPolicy(param_dtype=dtypes, reduce_dtype=torch.float32 if dtypes else None)
    layers = layers_to_wrap(loss, plan)
    for module in (*layers, loss):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=plan.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    if plan.forward_prefetch:
        for layer, following in pairwise(layers):
            assert isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)
            layer.set_modules_to_forward_prefetch([following])
    if main_reads:

        def value(name: str) -> torch.Tensor:
            return values[name] if promises is None or name in values else promises.read(promised[name])

        _share_parameters(loss, value, device)
        if promises is not None:
            promises.close()


def _mesh(plan: FsdpPlan, device: torch.device) -> DeviceMesh:
    if plan.num_replicas == 1:
        return init_device_mesh(device.type, (plan.num_shards,), mesh_dim_names=("shard",))
    sizes = (plan.num_replicas, plan.num_shards)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


def layers_to_wrap(loss: TokenLoss, plan: FsdpPlan) -> list[nn.Module]:
    """The layers that are gathered one by one, in order. Raises ModelError for a class that the model has not."""
    if not plan.wraps_layers:
        return []
    model = loss.bare
    classes = [type(module).__name__ for module in model.modules()]
    names = plan.layer_classes or tuple(getattr(model, "_no_split_modules", None) or ())
    present = [name for name in names if name in classes]
    unknown = [name for name in plan.layer_classes if name not in classes]
    if unknown or not present:
        what = f"no module of the class '{unknown[0]}'" if unknown else "no layers that it names itself"
        often = sorted({name for name in classes if classes.count(name) > 1})
        raise ModelError(
            f"{type(model).__name__} has {what}, so FSDP does not know what to gather at once.\nName the class of its "
            f"layers in fsdp_config.transformer_layer_cls_to_wrap; it has several of: {', '.join(often)}."
        )
    return [module for module in model.modules() if type(module).__name__ in present]


def _share_buffers(loss: TokenLoss, device: torch.device) -> None:
    for buffer in loss.buffers():
        on_device = buffer.to(device)
        distributed.broadcast(on_device, src=0)
        buffer.copy_(on_device)


@torch.no_grad()
def _share_parameters(loss: TokenLoss, value: Callable[[str], torch.Tensor], device: torch.device) -> None:
    """Rank 0 hands out the values that it has, one parameter at a time."""
    for name, parameter in loss.named_parameters():
        assert isinstance(parameter, DTensor)
        if distributed.get_rank() == 0:
            whole = value(name).to(device)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=0)
        parameter.to_local().copy_(mine.to_local())


class _Autocast(nn.Module):
    """Compute in the run's precision, as a model does that Accelerate prepared."""

    def __init__(self, inner: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self.inner = inner
        self.accelerator = accelerator

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.inner(*batch)


class FsdpEngine:
    """A module that shard_module has sharded, and an optimizer over its parts."""

    def __init__(
        self, accelerator: Accelerator, loss: TokenLoss, optimizer: torch.optim.Optimizer, plan: FsdpPlan
    ) -> None:
        self.accelerator, self.plan = accelerator, plan
        self.optimizer = optimizer
        self.name = plan.name
        self.module: nn.Module = _Autocast(loss, accelerator)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        whole = [name for name, p in loss.named_parameters() if not isinstance(p, DTensor)]
        assert isinstance(loss, FSDPModule) and not whole, f"not sharded: {whole}"
        assert all(isinstance(p, DTensor) for p in self.trained), "the optimizer was built before the sharding"

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        grad_norm = self._clip(max_norm)
        finite = loss_is_finite and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm, finite

    @torch.no_grad()
    def _clip(self, max_norm: float) -> float:
        """The norm of the whole gradient: the parts' sums of squares, added over the ranks. torch's own function needs
        a process group of the CPU for what is offloaded."""
        gradients = [p.grad.to_local() for p in self.trained if isinstance(p.grad, DTensor)]
        norms = torch._foreach_norm(gradients) if gradients else []
        device = self.accelerator.device
        squares = torch.stack([n.double() ** 2 for n in norms]).sum() if norms else torch.zeros((), dtype=torch.float64)
        squares = squares.to(device)
        distributed.all_reduce(squares)
        norm = math.sqrt(float(squares) / self.plan.num_replicas)  # copies have the same gradient
        if max_norm and math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
        return norm

    def held(self) -> Held:
        return held_by(self.module.parameters(), self.optimizer)

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        out: Tensors = {}
        for name, tensor in tensors.items():
            full = self._gathered(tensor.detach())
            if self.accelerator.is_main_process:
                out[name] = full.cpu().contiguous()
        return out

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        on_device: Any = tensor.to(self.accelerator.device)  # the CPU may have no process group
        return on_device.full_tensor()

    def optimizer_state(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        return self.whole(optimizer_tensors(self.optimizer, parameters, on_cpu=False))

    def load_optimizer_state(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        parts: Tensors = {}
        for key, tensor in tensors.items():
            parameter = parameters[key.rpartition("::")[0]]
            assert isinstance(parameter, DTensor)
            if tensor.shape == parameter.shape:  # every rank has read the whole and keeps its part
                tensor = distribute_tensor(
                    tensor.to(self.accelerator.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                ).to(parameter.to_local().device)
            parts[key] = tensor
        load_optimizer_tensors(self.optimizer, parameters, parts)
