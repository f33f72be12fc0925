"""Everything private of DeepSpeed that finetuner reads, in one class.

DeepSpeed has no public way to an fp32 shard of stages 1 and 2, to its place in the full tensor, or to the gradient
before the step. A release that renames one of these is refused at the start, with both versions.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import distributed, nn

from finetuner.errors import PlanError

TESTED = ("0.18", "0.19")
_OF_STAGE_3 = ("fp32_partitioned_groups_flat", "grad_position", "get_param_id", "_pre_step", "_overflow_clean_up")
_OF_STAGES_1_AND_2 = ("bit16_groups", "averaged_gradients", "single_partition_of_fp32_groups", "cpu_offload")


class DeepSpeedInternals:
    """The shards of a DeepSpeed engine: flat fp32 tensors that this rank updates, and what of each parameter is in
    them."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], stage: int
    ) -> None:
        """`optimizer`: the one that DeepSpeed was given, which had the parameters `trained` (any shapes).

        Raises PlanError for a DeepSpeed whose insides are others."""
        self.optimizer, self.trained, self.stage = optimizer, trained, stage
        self.zero: Any = engine.optimizer
        missing = [name for name in (_OF_STAGE_3 if stage == 3 else _OF_STAGES_1_AND_2) if not hasattr(self.zero, name)]
        if missing:
            raise PlanError(
                f"the {type(self.zero).__name__} of DeepSpeed {version('deepspeed')} has no '{missing[0]}': it is not "
                f"the optimizer of {' and '.join(TESTED)} that finetuner knows. Remove from the DeepSpeed file what "
                f"chooses another (such as data_types), or install: pip install 'deepspeed>={TESTED[0]},<0.20'"
            )

    def local_gradients(self) -> list[torch.Tensor]:
        """Return this rank's shards of the averaged gradient, of any shapes, between the last backward and the step."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            return [safe_get_local_grad(p) for p in self.trained]
        if self.zero.cpu_offload:
            return [flat.grad for flat in self.zero.single_partition_of_fp32_groups]
        return [piece for pieces in self.zero.averaged_gradients.values() for piece in pieces or ()]

    def skip_step(self) -> None:
        """Clear the gradient of a stage-3 engine without an update, as DeepSpeed itself does under fp16."""
        assert self.stage == 3, "stages 1 and 2 look at the gradient in every number format"
        self.zero._pre_step()
        self.zero._overflow_clean_up(1.0)

    def flat_tensors(self) -> list[torch.Tensor]:
        """Return the (elements,) fp32 tensors of this rank. Stage 3 shows the optimizer one of them at a time."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def flat_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the flat fp32 tensor that this rank updates for the group that `parameter` (any shape) is in."""
        if self.stage == 3:
            group, _, _ = self._position(parameter)
            return self.zero.fp32_partitioned_groups_flat[group]
        mapping = self._mapping(parameter)
        if mapping is not None:
            index = mapping.param_group_index
        else:  # no element of it is this rank's
            groups = self.zero.bit16_groups
            index = next(i for i, group in enumerate(groups) if any(p is parameter for p in group))
        return self.optimizer.param_groups[index]["params"][0]

    def place_of(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """Return (start in the flat tensor, start in the flattened parameter, elements) of this rank's shard.

        None if the rank holds nothing of the parameter. In stage 3 the last rank's shard may reach beyond the end of
        the parameter: it is padded.
        """
        if self.stage == 3:
            _, start, count = self._position(parameter)
            return start, count * distributed.get_rank(), count
        mapping = self._mapping(parameter)
        if mapping is None:
            return None
        in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        return in_flat.start, in_parameter.start, in_parameter.numel

    def local_shard(self, parameter: Any) -> torch.Tensor:
        """Return what this rank holds of a parameter (any shape): under stage 3 a flat shard."""
        return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter

    def is_sharded(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor (any shape) is one of stage 3's, which has to be gathered before it is read."""
        return hasattr(tensor, "ds_id")

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        return self.zero.grad_position[self.zero.get_param_id(parameter)]

    def _mapping(self, parameter: Any) -> Any:
        return parameter._hp_mapping
