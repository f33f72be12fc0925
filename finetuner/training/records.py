"""The rows of metrics.jsonl, as frozen values: one for each logged step, one for each evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """A logged step. `loss` and `figures` are exact over all ranks and micro-batches of the step.

    `num_tokens`: trained tokens of the step; `total_tokens`: of all steps; `tokens_per_second`: input tokens without
    padding, since the row before; `mfu`: model FLOP utilization (plan/flops.py), where it is known.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    total_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    mfu: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """Return the row by the names of metrics.jsonl; what is not known is left out."""
        row: dict[str, float] = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "num_tokens": self.num_tokens,
            "total_tokens": self.total_tokens,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        return row | dict(self.figures) | ({} if self.mfu is None else {"mfu": self.mfu})


@dataclass(frozen=True)
class EvaluationRecord:
    """The held-out loss after `step` steps.

    `perplexity` and `bits_per_byte`: where the objective is the likelihood of a text; `by_source`: loss of each source,
    where there are several.
    """

    step: int
    loss: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    by_source: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """Return the row by the names of metrics.jsonl; what is not known is left out."""
        row: dict[str, float] = {"step": self.step, "eval_loss": self.loss}
        if self.perplexity is not None:
            row["eval_perplexity"] = self.perplexity
        if self.bits_per_byte is not None:
            row["eval_bits_per_byte"] = self.bits_per_byte
        row |= {f"eval_{name}": value for name, value in self.figures.items()}
        return row | {f"eval_loss/{name}": value for name, value in self.by_source.items()}
