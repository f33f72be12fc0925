"""FSDP2: torch's `fully_shard` on the loss module, so that the head is gathered where it is used.

`fully_shard` is called directly and not through Accelerate, which has no FSDP on CPU ranks (it runs DDP and says
nothing), casts a whole model to fp32 before it shards it, and wants one dtype for a frozen bf16 base and the fp32
adapter on it. Gradients are reduced in every micro-batch: full gradients of a model that has to be sharded would not
fit.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finetuner.errors import ModelError
from finetuner.models.lazy_weights import LazyWeights
from finetuner.models.transformers_internals import layer_class_names
from finetuner.objectives.loss_module import LossModule, Question
from finetuner.parallel.engine import EngineRequest, RankMemory, Tensors, memory_of
from finetuner.parallel.gradient_norm import clip_factor, scale_, sum_of_squares
from finetuner.parallel.optimizer_state import (
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    torchao_part,
)
from finetuner.plan.parallel import FsdpOptions, ParallelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(request: EngineRequest) -> "FsdpEngine":
    """Shard the loss module in place and return FSDP2's engine. Raises ModelError for layers that it does not find."""
    shard_module(request.loss, request.plan, request.accelerator.device, full=request.full, lazy=request.lazy)
    return FsdpEngine(request.accelerator, request.loss, request.optimizer(), request.plan)


def shard_module(
    loss: LossModule, plan: ParallelPlan, device: torch.device, *, full: bool, lazy: LazyWeights | None = None
) -> None:
    """Replace every parameter of `loss` by this rank's shard of it, in place. Build the optimizer only after this.

    `full`: whether all of the model is trained. With `main_rank_reads` or lazy weights, only the values of rank 0
    count: it reads each full tensor, and hands every rank its shard.
    """
    options = plan.fsdp
    assert options is not None
    unread = {} if lazy is None else lazy.take_unread(loss)
    main_reads = options.main_rank_reads or lazy is not None
    values: Tensors = {}
    if main_reads:
        _share_buffers(loss, device)
        if distributed.get_rank() == 0:
            values = {name: p.detach() for name, p in loss.named_parameters() if name not in unread}
    _fully_shard(loss, options, _mesh(plan, device), full=full)
    if not main_reads:
        return

    def value(name: str) -> torch.Tensor:
        return values[name] if lazy is None or name in values else lazy.read(unread[name])

    _share_parameters(loss, value, device)
    if lazy is not None:
        lazy.close()


def _fully_shard(loss: LossModule, options: FsdpOptions, mesh: DeviceMesh, *, full: bool) -> None:
    """Shard the layers, then what is left of the module, so that both are gathered when they are used."""
    offload = CPUOffloadPolicy(pin_memory=options.pin_memory) if options.offload else OffloadPolicy()
    # A frozen base keeps its own dtype, and an adapter its fp32: what is trained alone is cast.
    dtypes = torch.bfloat16 if options.gathers_bf16 and full else None
    policy = MixedPrecisionPolicy(param_dtype=dtypes, reduce_dtype=torch.float32 if dtypes else None)
    layers = layers_to_wrap(loss.unwrapped, options)
    for module in (*layers, loss):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=options.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    if options.forward_prefetch:
        for layer, following in pairwise(layers):
            assert isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)
            layer.set_modules_to_forward_prefetch([following])


def _mesh(plan: ParallelPlan, device: torch.device) -> DeviceMesh:
    if plan.replicate == 1:
        return init_device_mesh(device.type, (plan.shard,), mesh_dim_names=("shard",))
    sizes = (plan.replicate, plan.shard)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


def layers_to_wrap(model: "PreTrainedModel", options: FsdpOptions) -> list[nn.Module]:
    """Return the layers that are gathered one at a time, in order. Raises ModelError for a class that the model has
    not."""
    if not options.wraps_layers:
        return []
    classes = [type(module).__name__ for module in model.modules()]
    names = options.layer_classes or layer_class_names(model)
    present = [name for name in names if name in classes]
    unknown = [name for name in options.layer_classes if name not in classes]
    if unknown:
        raise _no_layers(model, f"no module of the class '{unknown[0]}'", classes)
    if not present:
        raise _no_layers(model, "no layers that it names itself", classes)
    return [module for module in model.modules() if type(module).__name__ in present]


def _no_layers(model: nn.Module, what: str, classes: list[str]) -> ModelError:
    often = sorted(name for name, count in Counter(classes).items() if count > 1)
    return ModelError(
        f"{type(model).__name__} has {what}, so FSDP does not know what to gather at once.\nName the class of its "
        f"layers in fsdp_config.transformer_layer_cls_to_wrap; it has several of: {', '.join(often)}."
    )


def _share_buffers(loss: LossModule, device: torch.device) -> None:
    for buffer in loss.buffers():
        on_device = buffer.to(device)
        distributed.broadcast(on_device, src=0)
        buffer.copy_(on_device)


@torch.no_grad()
def _share_parameters(loss: LossModule, value: Callable[[str], torch.Tensor], device: torch.device) -> None:
    """Hand out the full values (any shapes) that rank 0 has, one parameter at a time; each rank keeps its shard."""
    for name, parameter in loss.named_parameters():
        assert isinstance(parameter, DTensor)
        if distributed.get_rank() == 0:
            full = value(name).to(device)
        else:
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        mine = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=0)
        parameter.to_local().copy_(mine.to_local())


class _Autocast(nn.Module):
    """Computes in the run's precision, as a module does that Accelerate prepared."""

    def __init__(self, inner: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self.inner = inner
        self.accelerator = accelerator

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.inner(*arguments, **named)


class FsdpEngine:
    """A module that shard_module has sharded, and an optimizer over this rank's shards."""

    def __init__(
        self, accelerator: Accelerator, loss: LossModule, optimizer: torch.optim.Optimizer, plan: ParallelPlan
    ) -> None:
        self.accelerator, self.plan = accelerator, plan
        self.optimizer = optimizer
        self.name = plan.name
        self.module: nn.Module = _Autocast(loss, accelerator)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        full = [name for name, p in loss.named_parameters() if not isinstance(p, DTensor)]
        assert isinstance(loss, FSDPModule) and not full, f"not sharded: {full}"
        assert all(isinstance(p, DTensor) for p in self.trained), "the optimizer was built before the sharding"

    @torch.no_grad()
    def ask(self, question: Question) -> float:
        answer = float(self.module(question=question))
        # No backward follows. What reshard_after_forward=False leaves gathered would stand in the place of the shards
        # under the parameters' names, and the optimizer has no state for it.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return answer

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        gradients = [p.grad.to_local() for p in self.trained if isinstance(p.grad, DTensor)]
        squares = sum_of_squares(gradients, self.accelerator.device)
        distributed.all_reduce(squares)
        norm = math.sqrt(float(squares) / self.plan.replicate)  # copies have the same gradient
        scale_(gradients, clip_factor(norm, max_norm))
        finite = loss_is_finite and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, finite

    def memory(self) -> RankMemory:
        return memory_of(self.module.parameters(), self.optimizer)

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        out: Tensors = {}
        for name, tensor in tensors.items():
            full = self._full(tensor.detach())
            if self.accelerator.is_main_process:
                out[name] = full.cpu().contiguous()
        return out

    def _full(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        on_device: Any = tensor.to(self.accelerator.device)  # the CPU may have no process group
        return on_device.full_tensor()

    def gather_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        if torchao_part(self.optimizer) is None:
            return self.gather(optimizer_tensors(self.optimizer, parameters, on_cpu=False))
        mine = optimizer_tensors(self.optimizer, parameters)  # by the ranks that hold them; of several copies the last
        of_ranks: list[Any] | None = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
        distributed.gather_object(mine, of_ranks)
        return {name: tensor for its in of_ranks or () for name, tensor in its.items()}

    def load_optimizer(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        if torchao_part(self.optimizer) is not None:
            load_optimizer_tensors(self.optimizer, parameters, tensors)
            return
        shards: Tensors = {}
        for key, tensor in tensors.items():
            parameter = parameters[key.rpartition("::")[0]]
            assert isinstance(parameter, DTensor)
            if tensor.shape == parameter.shape:  # every rank has read the full tensor and keeps its shard
                tensor = distribute_tensor(
                    tensor.to(self.accelerator.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                ).to(parameter.to_local().device)
            shards[key] = tensor
        load_optimizer_tensors(self.optimizer, parameters, shards)
