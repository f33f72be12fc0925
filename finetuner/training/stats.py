"""The figures of one step, over all ranks and micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepStats:
    """Figures of a step. `loss`: see Objective; `figures`: means to log beside it.

    `num_tokens`: trained tokens; `num_input_tokens`: all tokens without padding; `num_pairs`: T^2, summed over the
    documents of T tokens (what attention costs).
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_input_tokens: int
    num_pairs: int
    updated: bool
    figures: Mapping[str, float] = field(default_factory=dict)
