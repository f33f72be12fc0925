"""DeepSpeed's ZeRO, called directly: Accelerate runs DDP in its place on CPU ranks and says nothing.

The gradient is clipped here and not by DeepSpeed, whose norm in fp32 differs from that of other engines.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn

from finetuner.models.lazy_weights import LazyTensor, LazyWeights
from finetuner.objectives.loss_module import LossModule, Question
from finetuner.parallel.deepspeed_internals import DeepSpeedInternals
from finetuner.parallel.engine import EngineRequest, RankMemory, Tensors
from finetuner.parallel.gradient_norm import clip_factor, scale_, sum_of_squares
from finetuner.parallel.optimizer_state import (
    OF_RANKS,
    as_tensor,
    as_value,
    cannot_reshard_blocks,
    set_learning_rate,
)
from finetuner.plan.parallel import ParallelPlan
from finetuner.plan.zero import zero_config_for
from finetuner.world import name_local_rank


def build(request: EngineRequest) -> "ZeroEngine":
    """Hand the loss module to DeepSpeed and return the engine around it."""
    return ZeroEngine(request.accelerator, request.loss, request.optimizer(), request.plan, request.lazy)


class ZeroEngine:
    """A DeepSpeed engine over a module on the CPU or the device, and over an optimizer of its trained parameters.

    Under bf16 DeepSpeed casts all weights to bf16 and updates fp32 copies of those that are trained.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loss: LossModule,
        optimizer: torch.optim.Optimizer,
        plan: ParallelPlan,
        lazy: LazyWeights | None = None,
    ) -> None:
        assert plan.zero is not None
        self.accelerator, self.plan, self.name, self.stage = accelerator, plan, plan.name, plan.zero.stage
        self.optimizer = optimizer
        self.factor = 1.0  # of the gradient of this step: clipping is ours, by the exact norm
        optimizer.register_step_pre_hook(self._clip)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        unread = {} if lazy is None else lazy.take_unread(loss)
        late = {id(p) for name, p in loss.named_parameters() if name in unread}
        in_bf16 = plan.zero.config["bf16"]["enabled"]
        exact = {i: p.detach().clone() for i, p in enumerate(self.trained) if in_bf16 and id(p) not in late}
        config = zero_config_for(plan.zero, loss.unwrapped.config.get_text_config().hidden_size)
        config["gradient_clipping"] = 0.0
        engine = _initialize(loss, optimizer, config, accelerator.device)
        self.module: Any = engine
        assert engine.zero_optimization_stage() == self.stage, "DeepSpeed made another engine"
        assert distributed.get_world_size() == plan.shard
        self.internals = DeepSpeedInternals(engine, optimizer, self.trained, self.stage)
        for i, value in exact.items():
            # DeepSpeed took its fp32 copy from the weights that it had cast to bf16
            self._write_shard(self.trained[i], value, None)
        if lazy is not None:
            self._share_parameters(loss, lazy, unread)

    @torch.no_grad()
    def _share_parameters(self, loss: LossModule, lazy: LazyWeights, unread: Mapping[str, LazyTensor]) -> None:
        """Read lazy weights on rank 0 and hand them out, one parameter at a time."""
        from deepspeed.runtime.zero import GatheredParameters

        device = self.accelerator.device
        for name, parameter in loss.named_parameters():
            if name not in unread:
                continue
            if self.accelerator.is_main_process:
                value = lazy.read(unread[name]).to(device)
            else:
                value = torch.empty(unread[name].shape, dtype=unread[name].dtype, device=device)
            with GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    parameter.copy_(value)
            if parameter.requires_grad:  # and the fp32 copy, from which the next step would overwrite it
                distributed.broadcast(value, src=0)
                self._write_shard(parameter, value, None)
        lazy.close()

    @torch.no_grad()
    def ask(self, question: Question) -> float:
        return float(self.module(question=question))

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        squares = sum_of_squares(self.internals.local_gradients(), self.accelerator.device)
        distributed.all_reduce(squares)
        norm = math.sqrt(float(squares))
        if self.stage == 3 and not math.isfinite(norm):
            self.internals.skip_step()
            return math.inf, False
        self.factor = clip_factor(norm, max_norm)
        self.module.step()
        return norm, self.module.was_step_applied()

    def _clip(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """Scale the fp32 gradients that DeepSpeed has put on what is about to be updated."""
        scale_((p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None), self.factor)

    def memory(self) -> RankMemory:
        local = [self.internals.local_shard(p) for p in self.module.module.parameters()]
        flat = self.internals.flat_tensors()
        num_bytes = sum(t.numel() * t.element_size() for t in [*local, *flat])
        return RankMemory(sum(p.numel() for p in local), sum(p.numel() for p in flat), num_bytes)

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        out: Tensors = {}
        for name, tensor in tensors.items():
            full = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
            if full is not None:
                self._keep(out, name, full)
            elif self.internals.is_sharded(tensor):
                with GatheredParameters([tensor]):
                    self._keep(out, name, tensor.detach())
            else:
                self._keep(out, name, tensor.detach())
        return out

    def _keep(self, out: Tensors, name: str, tensor: torch.Tensor) -> None:
        if self.accelerator.is_main_process:
            out[name] = tensor.to("cpu", copy=True).contiguous()

    def gather_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        if any("qmap1" in state for state in self.optimizer.state.values()):
            return self._state_in_blocks()
        out: Tensors = {}
        for name, parameter in parameters.items():
            state = self.optimizer.state[self.internals.flat_of(parameter)]
            for key, value in state.items():
                tensor = as_tensor(value)
                is_sharded = tensor.numel() > 1
                self._keep(out, f"{name}::{key}", self._full_state(parameter, key) if is_sharded else tensor)
        return out

    def _state_in_blocks(self) -> Tensors:
        """Gather the state of every rank as it is: a block of 8 bits has one scale, and lies across parameters."""
        out: Tensors = {}
        for i, flat in enumerate(self.internals.flat_tensors()):
            for key, value in self.optimizer.state[flat].items():
                mine = as_tensor(value).to(self.accelerator.device)
                for rank in range(self.plan.shard):  # one after another: all at once would be the full state
                    its = mine.clone()
                    distributed.broadcast(its, src=rank)
                    self._keep(out, f"{self._shard_name(rank, i)}::{key}", its)
        return out

    def _shard_name(self, rank: int, index: int) -> str:
        # "part" is what checkpoints have: another word would not be found in them
        return f"{OF_RANKS}{rank} of {self.plan.shard}, stage {self.stage}, part {index}"

    def load_optimizer(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        if any(key.startswith(OF_RANKS) or key.endswith("::qmap1") for key in tensors):
            self._load_blocks(tensors)
            return
        for key, tensor in tensors.items():
            name, _, state_name = key.rpartition("::")
            parameter = parameters[name]
            flat = self.internals.flat_of(parameter)
            state = self.optimizer.state[flat]
            if tensor.numel() == 1:
                state[state_name] = as_value(tensor.clone())
                continue
            if state_name not in state:
                state[state_name] = torch.zeros_like(flat)
            self._write_shard(parameter, tensor, state_name)

    def _load_blocks(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore blocks of 8 bits. Raises CheckpointError if other shards were written than these ranks hold."""
        for i, flat in enumerate(self.internals.flat_tensors()):
            part = self._shard_name(distributed.get_rank(), i)
            its = {key.rpartition("::")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{part}::")}
            if not its or its["state1"].numel() != flat.numel():
                raise cannot_reshard_blocks(next(iter(tensors)), self.name)
            for key, tensor in its.items():
                self.optimizer.state[flat][key] = as_value(tensor.to(flat.device))

    def _full_state(self, parameter: nn.Parameter, state_name: str) -> torch.Tensor:
        """Return a state of the optimizer in the shape of its parameter, from the shards of all ranks."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(parameter, state_name)
        # DeepSpeed's function for stages 1 and 2 knows the states only of some optimizers
        full = torch.zeros(parameter.numel(), device=self.accelerator.device)
        place = self.internals.place_of(parameter)
        if place is not None:
            in_flat, in_parameter, count = place
            state = self.optimizer.state[self.internals.flat_of(parameter)][state_name]
            full.narrow(0, in_parameter, count).copy_(state.narrow(0, in_flat, count))
        distributed.all_reduce(full)
        return full.reshape(parameter.shape)

    @torch.no_grad()
    def _write_shard(self, parameter: nn.Parameter, value: torch.Tensor, state_name: str | None) -> None:
        """Write this rank's shard of a full `value` into the fp32 copy of the parameter, or into a state of it."""
        place = self.internals.place_of(parameter)
        if place is None:
            return
        in_flat, in_parameter, count = place
        flat = self.internals.flat_of(parameter)
        target = flat if state_name is None else self.optimizer.state[flat][state_name]
        mine = value.detach().flatten().to(target.device, target.dtype)[in_parameter:][:count]
        target.detach().narrow(0, in_flat, len(mine)).copy_(mine)


def _initialize(
    loss: LossModule, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device
) -> Any:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":  # DeepSpeed would take the GPU of a machine that has one
        set_accelerator(_cpu_without_a_compiler())
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    name_local_rank()
    engine, *_ = deepspeed.initialize(model=loss, optimizer=optimizer, config=config)
    return engine


def _cpu_without_a_compiler() -> Any:
    """Return DeepSpeed's CPU without the reduction in shared memory that it compiles at the first start, for minutes,
    and uses in inference alone."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Cpu(CPU_Accelerator):
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    return Cpu()
