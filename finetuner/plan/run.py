"""What the recipe means on this world: the arithmetic of a run, derived once and printed at its start.

Nothing here touches a model or a dataset; facts that are known late (rows) are arguments of `Plan.schedule`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

from finetuner.errors import PlanError
from finetuner.plan.parallel import EnginePlan, FsdpPlan, Precision, ZeroPlan, plan_engine
from finetuner.recipe import Recipe
from finetuner.recipe.schedules import Shape, multiplier
from finetuner.recipe.sections import (
    BatchSection,
    EvaluationSection,
    OutputSection,
    PrecisionSection,
    ScheduleSection,
)
from finetuner.world import World


@dataclass(frozen=True)
class Ramp:
    """The first steps of a run, which have fewer rows than the global batch.

    `begins`: rows learned before each of them, and after the last. `left_out`: how many fewer rows they take than as
    many whole steps would, by which every later step begins earlier.
    """

    begins: tuple[int, ...] = (0,)
    left_out: int = 0

    @classmethod
    def from_section(cls, section: BatchSection, global_batch: int) -> "Ramp":
        """Raises PlanError if the first step has the whole global batch already, or more."""
        ramp = section.rampup_batch_size
        if ramp is None:
            return cls()
        if ramp.start >= global_batch:
            raise PlanError(
                f"rampup_batch_size starts with {ramp.start} rows, which are to rise to a global batch of "
                f"{global_batch}.\nWrite a smaller start, remove rampup_batch_size, or raise "
                "gradient_accumulation_steps."
            )
        sizes = (ramp.start + (global_batch - ramp.start) * k // ramp.steps for k in range(ramp.steps))
        begins = tuple(accumulate(sizes, initial=0))
        return cls(begins, ramp.steps * global_batch - begins[-1])

    @property
    def steps(self) -> int:
        return len(self.begins) - 1

    def rows_before(self, step: int, global_batch: int) -> int:
        """Rows that `step` steps take, in an epoch without an end."""
        return self.begins[step] if step < len(self.begins) else step * global_batch - self.left_out

    def require_steps(self, total: int) -> None:
        """Raises PlanError unless a run of `total` steps comes to the whole global batch."""
        if self.steps > total:
            raise PlanError(
                f"the batch grows for {self.steps} steps, but the run has {total}.\n"
                f"Write `steps: {max(1, total // 10)}` in rampup_batch_size, or train longer (num_epochs, max_steps)."
            )

    def require_rows(self, num_rows: int, global_batch: int) -> None:
        """Raises PlanError unless the first epoch holds the ramp."""
        if self.begins[-1] > num_rows:
            start = self.begins[1]
            fitting = 2 * num_rows // (start + global_batch)  # steps have (start + global_batch) / 2 rows, or fewer
            instead = f"Write `steps: {fitting}` in it at most" if fitting else "Remove it"
            raise PlanError(
                f"the {self.steps} steps of rampup_batch_size take {self.begins[-1]:,} rows, but an epoch has "
                f"{num_rows:,}.\n{instead}, or train on more rows."
            )


@dataclass(frozen=True)
class Plan:
    """Batch and precision. `micro_batch` rows per rank and forward pass, `grad_accum` passes per rank and step."""

    data_parallel: int
    rank: int
    micro_batch: int
    grad_accum: int
    eval_batch: int
    precision: Precision
    seed: int
    engine: EnginePlan = None
    engine_notes: tuple[str, ...] = ()
    ramp: Ramp = Ramp()

    @property
    def global_batch(self) -> int:
        return self.data_parallel * self.micro_batch * self.grad_accum

    @property
    def batch_equation(self) -> str:
        rising = f"{self.ramp.begins[1]} rows, rising over {self.ramp.steps} steps to " if self.ramp.steps else ""
        return (
            f"{rising}{self.global_batch} rows = {self.data_parallel} {'rank' if self.data_parallel == 1 else 'ranks'}"
            f" x {self.micro_batch} micro-batch x {self.grad_accum} accumulation"
        )

    @classmethod
    def from_recipe(cls, recipe: Recipe, world: World) -> "Plan":
        """Raises PlanError if this world cannot do what the recipe asks for."""
        batch = recipe.batch
        precision = choose_precision(recipe.precision, world)
        engine, notes = plan_engine(
            recipe.sharding,
            world,
            precision=precision,
            micro_batch=batch.micro_batch_size,
            grad_accum=batch.gradient_accumulation_steps,
            max_grad_norm=recipe.optimizer.max_grad_norm,
        )
        in_shards = isinstance(engine, FsdpPlan) or (isinstance(engine, ZeroPlan) and engine.stage == 3)
        if in_shards and recipe.quantization.load_in_8bit:
            raise PlanError(
                "load_in_8bit is for one GPU, DDP and ZeRO-1 or 2: the scales of an 8-bit layer are lost where its "
                "weights are cut into parts.\nWrite `adapter: qlora`, which is smaller and can be sharded, or remove "
                "fsdp or deepspeed."
            )
        global_batch = world.size * batch.micro_batch_size * batch.gradient_accumulation_steps
        return cls(
            data_parallel=world.size,
            rank=world.rank,
            micro_batch=batch.micro_batch_size,
            grad_accum=batch.gradient_accumulation_steps,
            eval_batch=batch.eval_batch_size or batch.micro_batch_size,
            precision=precision,
            seed=recipe.output.seed,
            engine=engine,
            engine_notes=notes,
            ramp=Ramp.from_section(batch, global_batch),
        )

    def rows_before(self, step: int) -> int:
        """Rows of a stream that are learned in `step` steps."""
        return self.ramp.rows_before(step, self.global_batch)

    def schedule(self, recipe: Recipe, num_rows: int, num_tokens: int = 0) -> "Schedule":
        """Steps and learning rates for `num_rows` training rows (at least 1) of `num_tokens` in all. The rows of a
        stream are full, and so many as the steps take, so that the run is one epoch."""
        section, streams = recipe.schedule, recipe.data.streaming
        steps = section.max_steps
        if section.max_tokens is not None:
            rows, tokens = (1, recipe.data.sequence_len) if streams else (num_rows, num_tokens)
            whole = section.max_tokens * rows + self.ramp.left_out * tokens
            steps = -(-whole // (tokens * self.global_batch))
        if streams:
            self.ramp.require_steps(steps or 1)
            num_rows = self.rows_before(steps or 1)
        return Schedule.from_sections(
            section,
            recipe.evaluation,
            recipe.output,
            num_rows=num_rows,
            global_batch=self.global_batch,
            steps=steps,
            ramp=self.ramp,
        )


def choose_precision(section: PrecisionSection, world: World) -> Precision:
    """The number format of forward and backward.

    `bf16: true` needs a GPU that has it; on a CPU it is allowed, since it is right there and only slow where the
    processor emulates it. `auto` takes bf16 only where the device multiplies it natively.
    """
    if section.fp16:
        if world.device != "cuda":
            raise PlanError(f"fp16 needs a GPU, and this rank runs on {world.device}. Write `fp16: false`.")
        return "fp16"
    if section.bf16 is True and world.device == "cuda" and not world.bf16:
        raise PlanError("this GPU has no bfloat16. Write `bf16: auto` (fp32 here), or `bf16: false` and `fp16: true`.")
    use_bf16 = world.bf16 if section.bf16 == "auto" else section.bf16
    return "bf16" if use_bf16 else "fp32"


def ceil_of(share: float, count: int) -> int:
    """`share` of `count`, rounded up, of the decimal that was written: in floats, 1.1 x 10 is more than 11."""
    return math.ceil(Fraction(str(share)) * count)


@dataclass(frozen=True)
class Schedule:
    """When things happen. A *step* is one optimizer update; `step` counts the steps done before, from 0;
    `done` counts the steps done, from 1. Every epoch ends with a step of the rows that are left, so that each row
    is seen exactly once an epoch. The first epoch begins with the smaller steps of `ramp`, if it has any."""

    num_rows: int
    global_batch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    shape: Shape
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
    ramp: Ramp = Ramp()

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
        ramp: Ramp = Ramp(),
    ) -> "Schedule":
        """`steps`: of the run, where they are not those of max_steps or num_epochs."""
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
            min_lr_ratio=section.cosine_min_lr_ratio,
            logging_steps=output.logging_steps,
            eval_steps=evaluation.eval_steps,
            evals_per_epoch=evaluation.evals_per_epoch,
            eval_on_start=evaluation.eval_on_start,
            save_steps=output.save_steps,
            saves_per_epoch=output.saves_per_epoch,
            eval_strategy=evaluation.eval_strategy,
            save_strategy=output.save_strategy,
            save_first_step=output.save_first_step,
            settles_at=1.0 if section.cosine_constant_lr_ratio is None else section.cosine_constant_lr_ratio,
            shape_options=section.lr_scheduler_kwargs,
            ramp=ramp,
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch)

    @property
    def steps_of_first_epoch(self) -> int:
        """More than of a later one, if the batch begins smaller."""
        return math.ceil((self.num_rows + self.ramp.left_out) / self.global_batch)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates. See recipe/schedules.py for the shapes."""
        return self.peak_lr * multiplier(
            self.shape,
            step,
            total=self.total_steps,
            warmup=self.warmup_steps,
            peak=self.peak_lr,
            floor=self.min_lr_ratio,
            settles=self.settles_at,
            options=self.shape_options,
        )

    def rows_at(self, step: int) -> tuple[int, int, int]:
        """(epoch, start, stop): the step learns positions start..stop-1 of that epoch's order."""
        at, then = self._place(step), self._place(step + 1)
        return at.epoch, at.start, then.start if then.epoch == at.epoch else self.num_rows

    def epoch_at(self, done: int) -> float:
        """Epochs done after `done` steps, as a fraction."""
        at = self._place(done)
        return at.epoch + at.start / self.num_rows

    def rows_seen(self, done: int) -> int:
        """Rows learned from in the first `done` steps."""
        at = self._place(done)
        return at.epoch * self.num_rows + at.start

    def _place(self, step: int) -> "_Place":
        first = self.steps_of_first_epoch
        if step >= first:
            epoch, nth = divmod(step - first, self.steps_per_epoch)
            return _Place(epoch + 1, nth, self.steps_per_epoch, nth * self.global_batch)
        return _Place(0, step, first, self.ramp.rows_before(step, self.global_batch))

    def logs_at(self, done: int) -> bool:
        return done == 1 or done % self.logging_steps == 0 or done == self.total_steps

    def evaluates_at(self, done: int) -> bool:
        if self.eval_strategy == "no":
            return False
        return done == self.total_steps or self._due(done, self.eval_steps, self.evals_per_epoch)

    def saves_at(self, done: int, last: bool = False) -> bool:
        """`last`: no step follows, although `done` are not all. (The best held-out loss, or a signal, may ask for a
        checkpoint as well.)"""
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
    """Of a step: it is the nth, from 0, of so many in its epoch, and begins at that position of its order."""

    epoch: int
    nth: int
    steps: int
    start: int
