"""A recipe on this world: the arithmetic of a run, derived once and printed at its start.

Nothing here touches a model or a dataset; facts that are known late (rows) are arguments of `Plan.schedule`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from finetuner.errors import PlanError
from finetuner.plan.launch_config import require_same_launch_config
from finetuner.plan.parallel import ParallelPlan, ParallelRequest
from finetuner.plan.precision import Precision, choose_precision
from finetuner.plan.ramp import NO_RAMP, Ramp
from finetuner.plan.schedule import Schedule
from finetuner.recipe import Recipe
from finetuner.recipe.sections import BatchSection, ShardingSection
from finetuner.recipe.sections.sharding import ENGINE_KEYS
from finetuner.world import World

# `plan` of plan/<engine>.py, which is found by the engine's name
PlanEngine = Callable[[ParallelRequest], tuple[ParallelPlan, tuple[str, ...]]]


@dataclass(frozen=True)
class Plan:
    """Batch, precision and layout over ranks.

    `micro_batch`: rows per data-parallel rank and forward pass; `grad_accum`: forward passes per rank and step;
    `data_parallel_rank`: which share of a batch this rank takes (not its number in the world).
    """

    micro_batch: int
    grad_accum: int
    eval_batch: int
    precision: Precision
    seed: int
    data_parallel_rank: int = 0
    parallel: ParallelPlan = field(default_factory=ParallelPlan)
    notes: tuple[str, ...] = ()
    ramp: Ramp = NO_RAMP

    @property
    def data_parallel(self) -> int:
        return self.parallel.data_parallel

    @property
    def global_batch(self) -> int:
        """Rows of one step, over all ranks and micro-batches."""
        return self.data_parallel * self.micro_batch * self.grad_accum

    @property
    def batch_equation(self) -> str:
        """The arithmetic of the global batch, as "16 rows = 2 ranks x 4 micro-batch x 2 accumulation"."""
        rising = f"{self.ramp.begins[1]} rows, rising over {self.ramp.steps} steps to " if self.ramp.steps else ""
        return (
            f"{rising}{self.global_batch} rows = {self.data_parallel} {'rank' if self.data_parallel == 1 else 'ranks'}"
            f" x {self.micro_batch} micro-batch x {self.grad_accum} accumulation"
        )

    @classmethod
    def from_recipe(cls, recipe: Recipe, world: World) -> "Plan":
        """Return the plan. Raises PlanError if this world cannot do what the recipe asks for."""
        batch = recipe.batch
        precision = choose_precision(recipe.precision, world)
        parallel, notes = plan_parallel(
            recipe.sharding, batch, world, precision=precision, max_grad_norm=recipe.optimizer.max_grad_norm
        )
        if parallel.shards_weights and recipe.quantization.load_in_8bit:
            raise PlanError(
                "load_in_8bit is for one GPU, DDP and ZeRO-1 or 2: the scales of an 8-bit layer are lost where its "
                "weights are sharded.\nWrite `adapter: qlora`, which is smaller and can be sharded, or remove "
                "fsdp or deepspeed."
            )
        rows_per_step = parallel.data_parallel * batch.micro_batch_size * batch.gradient_accumulation_steps
        return cls(
            micro_batch=batch.micro_batch_size,
            grad_accum=batch.gradient_accumulation_steps,
            eval_batch=batch.eval_batch_size or batch.micro_batch_size,
            precision=precision,
            seed=recipe.output.seed,
            data_parallel_rank=parallel.data_parallel_rank(world.rank),
            parallel=parallel,
            notes=notes,
            ramp=Ramp.from_section(batch, rows_per_step),
        )

    def rows_before(self, step: int) -> int:
        """Return the number of rows of a stream that `step` steps take."""
        return self.ramp.rows_before(step, self.global_batch)

    def schedule(self, recipe: Recipe, num_rows: int, num_tokens: int = 0) -> "Schedule":
        """Return steps and learning rates for `num_rows` training rows (at least 1) of `num_tokens` in all.

        The rows of a stream are full, and so many as the steps take, so that the run is one epoch.
        """
        section, streams = recipe.schedule, recipe.data.streaming
        steps = section.max_steps
        if section.max_tokens is not None:
            rows, tokens = (1, recipe.data.sequence_len) if streams else (num_rows, num_tokens)
            total = section.max_tokens * rows + self.ramp.left_out * tokens
            steps = -(-total // (tokens * self.global_batch))
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


def plan_parallel(
    section: ShardingSection, batch: BatchSection, world: World, *, precision: Precision, max_grad_norm: float
) -> tuple[ParallelPlan, tuple[str, ...]]:
    """Return the layout over the ranks of the world, and notes on what was mapped.

    Raises PlanError for what this world or the launcher cannot do.
    """
    parallel = ParallelPlan(replicate=world.size)
    notes: tuple[str, ...] = ()
    if section.engine in ENGINE_KEYS:
        request = ParallelRequest(
            section, world, precision, batch.micro_batch_size, batch.gradient_accumulation_steps, max_grad_norm
        )
        plan_engine: PlanEngine = import_module(f"finetuner.plan.{section.engine}").plan
        parallel, notes = plan_engine(request)
    asked = ENGINE_KEYS[section.engine][0] if section.engine in ENGINE_KEYS else None
    require_same_launch_config(world.launch, asked, parallel, precision, section.deepspeed)
    parallel.require_supported(precision=precision, device=world.device)
    return parallel, notes
