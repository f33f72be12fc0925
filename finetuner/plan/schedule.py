"""The steps of a run: their rows and learning rates, and when it logs, evaluates and saves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from finetuner.errors import PlanError
from finetuner.plan.ramp import NO_RAMP, Ramp
from finetuner.recipe.schedules import ScheduleShape, multiplier
from finetuner.recipe.sections import (
    EvaluationSection,
    OutputSection,
    ScheduleSection,
)


def ceil_of(share: float, count: int) -> int:
    """Return `share` of `count`, rounded up, for the decimal that was written: in floats, 1.1 x 10 is more than 11."""
    return math.ceil(Fraction(str(share)) * count)


def steps_between(every: float | None, total: int) -> int | None:
    """Return the steps from one event to the next: `every` itself, or that part of `total` if it is below 1.

    In floats and rounded up, as transformers has it: an event may not move against another tool's curve by a step.
    """
    if every is None:
        return None
    return math.ceil(total * every) if every < 1 else int(every)


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run, as pure functions of a step.

    A *step* is one optimizer update; `step` counts the steps before it, from 0; `done` counts the steps done, from 1.
    Every epoch ends with a step of the rows that are left, so that each row is seen exactly once an epoch. The first
    epoch begins with the smaller steps of `ramp`, if it has any.
    """

    num_rows: int
    global_batch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    shape: ScheduleShape
    min_lr_ratio: float
    logging_steps: int
    eval_steps: int | None
    evals_per_epoch: int | None
    eval_on_start: bool
    save_steps: int | None
    saves_per_epoch: int | None
    eval_strategy: str | None = None
    save_strategy: str | None = None
    save_first_step: bool = False
    settles_at: float = 1.0
    shape_options: Mapping[str, Any] = field(default_factory=dict)
    quadratic_warmup: bool = False
    ramp: Ramp = NO_RAMP

    @classmethod
    def from_sections(
        cls,
        section: ScheduleSection,
        evaluation: EvaluationSection,
        output: OutputSection,
        *,
        num_rows: int,
        global_batch: int,
        steps: int | None = None,
        ramp: Ramp = NO_RAMP,
    ) -> "Schedule":
        """Return the schedule over `num_rows` rows. `steps`: of the run, if max_steps and num_epochs do not say.

        Raises PlanError if warmup, decay or ramp are longer than the run.
        """
        ramp.require_rows(num_rows, global_batch)
        steps_per_epoch = math.ceil(num_rows / global_batch)
        added = math.ceil((num_rows + ramp.left_out) / global_batch) - steps_per_epoch
        total = steps or section.max_steps or ceil_of(section.num_epochs, steps_per_epoch) + added
        ramp.require_steps(total)
        warmup = section.warmup_steps
        if warmup is None:
            warmup = ceil_of(section.warmup_ratio or 0.0, total)
        if warmup > total:
            raise PlanError(
                f"the warmup of {warmup} steps is longer than the run of {total} steps.\n"
                f"Write `warmup_steps: {total // 10}`, or train longer (num_epochs, max_steps)."
            )
        decay = int(section.lr_scheduler_kwargs.get("num_decay_steps", 0))
        if warmup + decay > total:
            raise PlanError(
                f"{warmup} steps of warmup and {decay} of decay are more than the {total} steps of the run.\n"
                f"Set num_decay_steps in lr_scheduler_kwargs to {total - warmup} at most."
            )
        return cls(
            num_rows=num_rows,
            global_batch=global_batch,
            total_steps=total,
            warmup_steps=warmup,
            peak_lr=section.learning_rate,
            shape=section.lr_scheduler,
            min_lr_ratio=section.lowest_rate,
            logging_steps=steps_between(output.logging_steps, total) or 1,
            eval_steps=steps_between(evaluation.eval_steps, total),
            evals_per_epoch=evaluation.evals_per_epoch,
            eval_on_start=evaluation.eval_on_start,
            save_steps=steps_between(output.save_steps, total),
            saves_per_epoch=output.saves_per_epoch,
            eval_strategy=evaluation.eval_strategy,
            save_strategy=output.save_strategy,
            save_first_step=output.save_first_step,
            settles_at=1.0 if section.cosine_constant_lr_ratio is None else section.cosine_constant_lr_ratio,
            shape_options=section.lr_scheduler_kwargs,
            quadratic_warmup=section.lr_quadratic_warmup,
            ramp=ramp,
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch)

    @property
    def steps_of_first_epoch(self) -> int:
        """Steps of the first epoch: more than of a later one if the batch begins smaller."""
        return math.ceil((self.num_rows + self.ramp.left_out) / self.global_batch)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` updates (recipe/schedules.py)."""
        return self.peak_lr * multiplier(
            self.shape,
            step,
            total=self.total_steps,
            warmup=self.warmup_steps,
            peak=self.peak_lr,
            floor=self.min_lr_ratio,
            settles=self.settles_at,
            options=self.shape_options,
            quadratic_warmup=self.quadratic_warmup,
        )

    def rows_at(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop): the step trains on positions start..stop-1 of that epoch's order."""
        at, then = self._place(step), self._place(step + 1)
        return at.epoch, at.start, then.start if then.epoch == at.epoch else self.num_rows

    def epoch_at(self, done: int) -> float:
        """Return the epochs done after `done` steps, as a fraction."""
        at = self._place(done)
        return at.epoch + at.start / self.num_rows

    def rows_seen(self, done: int) -> int:
        """Count the rows of the first `done` steps."""
        at = self._place(done)
        return at.epoch * self.num_rows + at.start

    def _place(self, step: int) -> "_Place":
        first = self.steps_of_first_epoch
        if step >= first:
            epoch, nth = divmod(step - first, self.steps_per_epoch)
            return _Place(epoch + 1, nth, self.steps_per_epoch, nth * self.global_batch)
        return _Place(0, step, first, self.ramp.rows_before(step, self.global_batch))

    def logs_at(self, done: int) -> bool:
        """Whether a line is logged after `done` steps."""
        return done == 1 or done % self.logging_steps == 0 or done == self.total_steps

    def evaluates_at(self, done: int) -> bool:
        """Whether the held-out loss is taken after `done` steps."""
        if self.eval_strategy == "no":
            return False
        return done == self.total_steps or self._due(done, self.eval_steps, self.evals_per_epoch)

    def saves_at(self, done: int, last: bool = False) -> bool:
        """Whether the schedule asks for a checkpoint after `done` steps; the best loss or a signal may ask too.

        `last`: no step follows, although the run is not complete.
        """
        if done == 1 and self.save_first_step:
            return True
        if self.save_strategy in ("no", "best"):
            return False
        return last or done == self.total_steps or self._due(done, self.save_steps, self.saves_per_epoch)

    def _due(self, done: int, every: int | None, per_epoch: int | None) -> bool:
        if every is not None:
            return done % every == 0
        # n times an epoch: whenever a further n-th of the epoch is complete
        times, at = per_epoch or 1, self._place(done - 1)
        return (at.nth + 1) * times // at.steps > at.nth * times // at.steps


class _Place(NamedTuple):
    """The place of a step: the `nth`, from 0, of `steps` in its epoch, beginning at position `start` of its order."""

    epoch: int
    nth: int
    steps: int
    start: int
