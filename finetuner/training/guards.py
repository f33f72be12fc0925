"""Guards against a run that goes wrong: steps without an update, a loss too high, no more progress.

Pure functions of the state and the newest figures; the counts are part of the state, so that a resumed run stops where
the unbroken one would.
"""

import math
from dataclasses import dataclass, replace

from finetuner.errors import TrainingError
from finetuner.plan.precision import Precision
from finetuner.recipe.sections import GuardSection
from finetuner.training.state import TrainState

# A single bad batch is survivable; weights that are NaN are not, and then every step is bad.
MAX_SKIPPED_STEPS = 2
# The loss scaler of fp16 begins too high and halves at each overflow until it fits.
MAX_SKIPPED_STEPS_FP16 = 19
LOSS_PATIENCE = 3


@dataclass(frozen=True)
class Guards:
    """Limits of a run; None: no limit."""

    max_skipped_steps: int = MAX_SKIPPED_STEPS
    highest_loss: float | None = None
    loss_patience: int = LOSS_PATIENCE
    eval_patience: int | None = None
    least_gain: float = 0.0
    saves_best: bool = False

    @classmethod
    def from_section(cls, section: GuardSection, precision: Precision, save_strategy: str | None) -> "Guards":
        usual = MAX_SKIPPED_STEPS_FP16 if precision == "fp16" else MAX_SKIPPED_STEPS
        return cls(
            max_skipped_steps=section.max_skipped_steps or usual,
            highest_loss=section.loss_watchdog_threshold,
            loss_patience=section.loss_watchdog_patience or LOSS_PATIENCE,
            eval_patience=section.early_stopping_patience,
            least_gain=section.early_stopping_threshold,
            saves_best=section.load_best_model_at_end or save_strategy == "best",
        )

    def after_step(self, state: TrainState, *, updated: bool, loss: float) -> TrainState:
        """Count a step that was skipped (`updated` is false) or whose loss is too high."""
        high = self.highest_loss is not None and math.isfinite(loss) and loss > self.highest_loss
        return replace(
            state,
            bad_steps=0 if updated else state.bad_steps + 1,
            skipped_steps=state.skipped_steps + (not updated),
            high_loss_steps=state.high_loss_steps + 1 if high else 0,
        )

    def require_sound(self, state: TrainState, *, loss: float, grad_norm: float, peak_lr: float) -> None:
        """Raises TrainingError if the run has gone wrong for as long as it may."""
        if state.bad_steps > self.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {state.bad_steps} steps in a row (the last: {state.step}, loss "
                f"{loss}, gradient norm {grad_norm}).\nNothing was saved since. Try a smaller learning_rate (it is "
                f"{peak_lr}), warmup_ratio=0.1, or bf16 instead of fp16."
            )
        if state.high_loss_steps >= self.loss_patience:
            raise TrainingError(
                f"the loss was above loss_watchdog_threshold ({self.highest_loss}) in {state.high_loss_steps} steps in "
                f"a row (the last: {state.step}, loss {loss:.4f}).\nTry a smaller learning_rate (it is {peak_lr}), or "
                "look at the rows; if such a loss is right, raise the threshold."
            )

    def after_evaluation(self, state: TrainState, loss: float) -> TrainState:
        """Remember the lowest held-out loss, and stop after `eval_patience` evaluations without a lower one."""
        before = state.best_eval_loss
        if math.isfinite(loss) and (before is None or loss < before - self.least_gain):
            return replace(state, best_eval_loss=loss, best_step=state.step, evals_without_gain=0)
        waited = state.evals_without_gain + 1
        stopped = self.eval_patience is not None and waited >= self.eval_patience
        return replace(state, evals_without_gain=waited, stopped_early=stopped)
