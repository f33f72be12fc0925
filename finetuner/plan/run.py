"""What the recipe means on this world: the arithmetic of a run, derived once and printed at its start.

Nothing here touches a model or a dataset; facts that are known late (rows) are arguments of `Plan.schedule`.
"""

from dataclasses import dataclass

from finetuner.errors import PlanError
from finetuner.plan.parallel import EnginePlan, FsdpPlan, ZeroPlan, plan_engine
from finetuner.plan.precision import Precision, choose_precision
from finetuner.plan.ramp import NO_RAMP, Ramp
from finetuner.plan.schedule import Schedule
from finetuner.recipe import Recipe
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
    ramp: Ramp = NO_RAMP

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
