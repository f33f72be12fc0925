"""DeepSpeed's ZeRO, called directly: Accelerate runs DDP in its place on CPU ranks and says nothing."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn

from finetuner.models.lazy_weights import LazyTensor, LazyWeights
from finetuner.objectives.next_token import TokenLoss
from finetuner.parallel.engine import Held, Tensors
from finetuner.parallel.optimizer_state import (
    OF_RANKS,
    as_tensor,
    as_value,
    blocks_are_of,
    set_learning_rate,
)
from finetuner.plan.parallel import ZeroPlan, zero_config_for
from finetuner.world import name_local_rank


class ZeroEngine:
    """A DeepSpeed engine over a module on the CPU or the device, and over an optimizer of its trained parameters.

    Under bf16 DeepSpeed casts all weights to bf16 and updates fp32 copies of those that are trained.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loss: TokenLoss,
        optimizer: torch.optim.Optimizer,
        plan: ZeroPlan,
        promises: LazyWeights | None = None,
    ) -> None:
        self.accelerator, self.plan, self.name = accelerator, plan, plan.name
        self.optimizer = optimizer
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        promised = {} if promises is None else promises.take_unread(loss)
        late = {id(p) for name, p in loss.named_parameters() if name in promised}
        in_bf16 = plan.config["bf16"]["enabled"]
        exact = {i: p.detach().clone() for i, p in enumerate(self.trained) if in_bf16 and id(p) not in late}
        config = zero_config_for(plan, loss.bare.config.get_text_config().hidden_size)
        engine = _initialize(loss, optimizer, config, accelerator.device)
        self.module: Any = engine
        assert engine.zero_optimization_stage() == plan.stage, "DeepSpeed made another engine"
        assert distributed.get_world_size() == plan.num_shards
        for i, value in exact.items():
            # DeepSpeed took its fp32 copy from the weights that it had cast to bf16
            self._write_part(self.trained[i], value, None)
        if promises is not None:
            self._share_parameters(loss, promises, promised)

    @torch.no_grad()
    def _share_parameters(self, loss: TokenLoss, promises: LazyWeights, promised: Mapping[str, LazyTensor]) -> None:
        """Rank 0 reads what is promised and hands it out, one parameter at a time."""
        from deepspeed.runtime.zero import GatheredParameters

        device = self.accelerator.device
        for name, parameter in loss.named_parameters():
            if name not in promised:
                continue
            if self.accelerator.is_main_process:
                value = promises.read(promised[name]).to(device)
            else:
                value = torch.empty(promised[name].shape, dtype=promised[name].dtype, device=device)
            with GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    parameter.copy_(value)
            if parameter.requires_grad:  # and the fp32 copy, from which the next step would overwrite it
                distributed.broadcast(value, src=0)
                self._write_part(parameter, value, None)
        promises.close()

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def update(self, max_norm: float, *, loss_is_finite: bool) -> tuple[float, bool]:
        """`max_norm` is in DeepSpeed's configuration already."""
        if self.plan.stage == 3 and not self._gradient_is_finite():
            # As DeepSpeed itself does under fp16. Stages 1 and 2 look at the gradient in every number format.
            self.module.optimizer._pre_step()
            self.module.optimizer._overflow_clean_up(1.0)
            return math.inf, False
        self.module.step()
        return float(self.module.get_global_grad_norm()), self.module.was_step_applied()

    def _gradient_is_finite(self) -> bool:
        from deepspeed.utils import safe_get_local_grad

        parts = [safe_get_local_grad(p) for p in self.trained]
        bad = torch.stack([~part.isfinite().all() for part in parts]).any().to(torch.float32)
        distributed.all_reduce(bad)
        return not bool(bad)

    def held(self) -> Held:
        parameters = self.module.module.parameters()
        local = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in parameters]
        flat = self._flats()
        num_bytes = sum(t.numel() * t.element_size() for t in [*local, *flat])
        return Held(sum(p.numel() for p in local), sum(p.numel() for p in flat), num_bytes)

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        out: Tensors = {}
        for name, tensor in tensors.items():
            full = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
            if full is not None:
                self._keep(out, name, full)
            elif hasattr(tensor, "ds_id"):
                with GatheredParameters([tensor]):
                    self._keep(out, name, tensor.detach())
            else:
                self._keep(out, name, tensor.detach())
        return out

    def _keep(self, out: Tensors, name: str, tensor: torch.Tensor) -> None:
        if self.accelerator.is_main_process:
            out[name] = tensor.to("cpu", copy=True).contiguous()

    def optimizer_state(self, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        if any("qmap1" in state for state in self.optimizer.state.values()):
            return self._state_in_blocks()
        out: Tensors = {}
        for name, parameter in parameters.items():
            state = self.optimizer.state[self._flat(parameter)]
            for key, value in state.items():
                tensor = as_tensor(value)
                spread = tensor.numel() > 1
                self._keep(out, f"{name}::{key}", self._whole_state(parameter, key) if spread else tensor)
        return out

    def _state_in_blocks(self) -> Tensors:
        """The state of every rank as it is: a block of 8 bits has one scale, and lies across parameters."""
        out: Tensors = {}
        for i, flat in enumerate(self._flats()):
            for key, value in self.optimizer.state[flat].items():
                mine = as_tensor(value).to(self.accelerator.device)
                for rank in range(self.plan.num_shards):  # one after another: all at once would be the whole state
                    its = mine.clone()
                    distributed.broadcast(its, src=rank)
                    self._keep(out, f"{self._part(rank, i)}::{key}", its)
        return out

    def _part(self, rank: int, index: int) -> str:
        return f"{OF_RANKS}{rank} of {self.plan.num_shards}, stage {self.plan.stage}, part {index}"

    def load_optimizer_state(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        if any(key.startswith(OF_RANKS) or key.endswith("::qmap1") for key in tensors):
            self._load_blocks(tensors)
            return
        for key, tensor in tensors.items():
            name, _, state_name = key.rpartition("::")
            parameter = parameters[name]
            flat = self._flat(parameter)
            state = self.optimizer.state[flat]
            if tensor.numel() == 1:
                state[state_name] = as_value(tensor.clone())
                continue
            if state_name not in state:
                state[state_name] = torch.zeros_like(flat)
            self._write_part(parameter, tensor, state_name)

    def _load_blocks(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises CheckpointError if the ranks that wrote them held other parts than these."""
        for i, flat in enumerate(self._flats()):
            part = self._part(distributed.get_rank(), i)
            its = {key.rpartition("::")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{part}::")}
            if not its or its["state1"].numel() != flat.numel():
                raise blocks_are_of(next(iter(tensors)), self.name)
            for key, tensor in its.items():
                self.optimizer.state[flat][key] = as_value(tensor.to(flat.device))

    def _flats(self) -> list[torch.Tensor]:
        """What this rank updates: flat fp32 tensors. Stage 3 shows the optimizer one of them at a time."""
        if self.plan.stage == 3:
            return list(self.module.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _flat(self, parameter: nn.Parameter) -> torch.Tensor:
        """The flat fp32 tensor that this rank updates for the group that `parameter` is in."""
        if self.plan.stage == 3:
            group, _, _ = self._position(parameter)
            return self.module.optimizer.fp32_partitioned_groups_flat[group]
        fragment: Any = parameter
        if fragment._hp_mapping is not None:
            index = fragment._hp_mapping.param_group_index
        else:  # no part of it is this rank's
            groups = self.module.optimizer.bit16_groups
            index = next(i for i, group in enumerate(groups) if any(p is parameter for p in group))
        return self.optimizer.param_groups[index]["params"][0]

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        optimizer = self.module.optimizer
        return optimizer.grad_position[optimizer.get_param_id(parameter)]

    def _whole_state(self, parameter: nn.Parameter, state_name: str) -> torch.Tensor:
        if self.plan.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(parameter, state_name)
        # DeepSpeed's function for stages 1 and 2 knows the states only of some optimizers
        whole = torch.zeros(parameter.numel(), device=self.accelerator.device)
        fragment: Any = parameter
        if fragment._hp_mapping is not None:
            there, here = fragment._hp_mapping.hp_fragment_address, fragment._hp_mapping.lp_fragment_address
            state = self.optimizer.state[self._flat(parameter)][state_name]
            whole.narrow(0, here.start, here.numel).copy_(state.narrow(0, there.start, there.numel))
        distributed.all_reduce(whole)
        return whole.reshape(parameter.shape)

    @torch.no_grad()
    def _write_part(self, parameter: nn.Parameter, value: torch.Tensor, state_name: str | None) -> None:
        """This rank's part of a whole `value`, into the fp32 copy of the parameter or into a state of it."""
        flat = self._flat(parameter)
        target = flat if state_name is None else self.optimizer.state[flat][state_name]
        whole = value.detach().flatten().to(target.device, target.dtype)
        if self.plan.stage == 3:
            _, start, count = self._position(parameter)
            mine = whole[count * distributed.get_rank() :][:count]  # the last rank's part may be padded
        else:
            fragment: Any = parameter
            if fragment._hp_mapping is None:
                return
            there, here = fragment._hp_mapping.hp_fragment_address, fragment._hp_mapping.lp_fragment_address
            start, mine = there.start, whole.narrow(0, here.start, here.numel)
        target.detach().narrow(0, start, len(mine)).copy_(mine)


def _initialize(loss: TokenLoss, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device) -> Any:
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
    """DeepSpeed's CPU, but for the reduction in shared memory that it compiles at the first start, for minutes, and
    uses in inference alone."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Cpu(CPU_Accelerator):
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    return Cpu()
