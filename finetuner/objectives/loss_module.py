"""The outermost module of a run: a batch in, the objective's sums out."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetuner.data.batches import BatchTensors
from finetuner.models.activation_offloading import HostedActivations
from finetuner.models.document_isolation import require_isolation
from finetuner.objectives.base import Objective
from finetuner.objectives.logits import ChunkSums, head_is_composable, sum_over_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Asked of the module while an engine has gathered what its forward uses.
Question = Callable[["LossModule"], float]


class LossModule(nn.Module):
    """A causal language model and what is minimized with it.

    Being the only module that DDP, FSDP or DeepSpeed wraps, it is where they gather what its forward uses, the head
    included. `unwrapped`: the transformers model without PEFT's wrapper.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        objective: Objective,
        *,
        composed: bool = False,
        activations: HostedActivations | None = None,
    ) -> None:
        """`composed`: whether the head can be called by itself. `probe_head` finds out when the weights are loaded.

        `activations`: where those of the decoder wait for the backward, if not on the device.
        """
        super().__init__()
        self.activations = activations
        self.model = model  # optimizer states in checkpoints are named by this attribute
        self.objective = objective
        self.composed = composed

    @property
    def unwrapped(self) -> "PreTrainedModel":
        from peft import PeftModel

        inner: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return inner

    def forward(self, batch: BatchTensors | None = None, *, question: Question | None = None) -> torch.Tensor:
        """Return the (K + F,) sums of a batch in fp32, see Objective.sums; with a `question`, its answer (scalar)."""
        if question is not None:
            return torch.tensor(float(question(self)))
        assert batch is not None
        return self.objective.sums(self, batch)

    def sum_over_logits(self, batch: BatchTensors, chunk_sums: ChunkSums) -> torch.Tensor:
        """Return `chunk_sums` summed over the trained positions of a batch, in the shape that it gives."""
        return sum_over_logits(self.unwrapped, batch, chunk_sums, composed=self.composed, activations=self.activations)

    @torch.no_grad()
    def probe_head(self, *, packs: bool) -> bool:
        """Try on the loaded weights whether the head can run apart from the decoder; return the answer.

        Raises ModelError for a model that cannot be trained like this; `packs`: also for one that does not keep the
        documents of a pack apart.
        """
        self.composed = head_is_composable(self.unwrapped)
        if packs:
            require_isolation(self.unwrapped)
        return self.composed
