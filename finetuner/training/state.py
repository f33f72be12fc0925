"""The state of a run beside weights and optimizer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Counts that a resumed run goes on from. Replaced, never edited; written into every checkpoint."""

    step: int = 0  # steps done
    trained_tokens: int = 0
    bad_steps: int = 0  # steps in a row whose gradient was not finite
    skipped_steps: int = 0  # such steps in all
    high_loss_steps: int = 0  # steps in a row above loss_watchdog_threshold
    best_eval_loss: float | None = None
    best_step: int | None = None  # where it was taken
    evals_without_gain: int = 0
    stopped_early: bool = False
