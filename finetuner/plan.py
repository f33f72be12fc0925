"""What the recipe means on this world: the arithmetic of a run, derived once and printed at its start.

Nothing here touches a model or a dataset; facts that are known late (rows) are arguments of `Plan.schedule`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from finetuner.errors import PlanError
from finetuner.recipe import Recipe
from finetuner.recipe.schedules import Shape, multiplier
from finetuner.recipe.sections import EvaluationSection, OutputSection, PrecisionSection, ScheduleSection
from finetuner.sharding import EnginePlan, FsdpPlan, Precision, ZeroPlan, plan_engine
from finetuner.world import World


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

    @property
    def global_batch(self) -> int:
        return self.data_parallel * self.micro_batch * self.grad_accum

    @property
    def batch_equation(self) -> str:
        return (
            f"{self.global_batch} rows = {self.data_parallel} {'rank' if self.data_parallel == 1 else 'ranks'}"
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
        )

    def schedule(self, recipe: Recipe, num_rows: int, num_tokens: int = 0) -> "Schedule":
        """Steps and learning rates for `num_rows` training rows (at least 1) of `num_tokens` in all. The rows of a
        stream are full, and so many as the steps take, so that the run is one epoch."""
        section, streams = recipe.schedule, recipe.data.streaming
        steps = section.max_steps
        if section.max_tokens is not None:
            rows, tokens = (1, recipe.data.sequence_len) if streams else (num_rows, num_tokens)
            steps = -(-section.max_tokens * rows // (tokens * self.global_batch))
        if streams:
            num_rows = (steps or 1) * self.global_batch
        return Schedule.from_sections(
            section, recipe.evaluation, recipe.output, num_rows=num_rows, global_batch=self.global_batch, steps=steps
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
    is seen exactly once an epoch."""

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
    ) -> "Schedule":
        """`steps`: of the run, where they are not those of max_steps or num_epochs."""
        steps_per_epoch = math.ceil(num_rows / global_batch)
        total = steps or section.max_steps or ceil_of(section.num_epochs, steps_per_epoch)
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
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch)

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
        epoch, nth = divmod(step, self.steps_per_epoch)
        start = nth * self.global_batch
        return epoch, start, min(start + self.global_batch, self.num_rows)

    def epoch_at(self, done: int) -> float:
        """Epochs done after `done` steps, as a fraction."""
        epoch, nth = divmod(done, self.steps_per_epoch)
        return epoch + nth * self.global_batch / self.num_rows

    def rows_seen(self, done: int) -> int:
        """Rows learned from in the first `done` steps."""
        epoch, nth = divmod(done, self.steps_per_epoch)
        return epoch * self.num_rows + nth * self.global_batch

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
        times = per_epoch or 1
        return done * times // self.steps_per_epoch > (done - 1) * times // self.steps_per_epoch
