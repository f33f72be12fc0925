"""A token store of rows that tell their number, the plans of ranks over it, and what a batch holds of it."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from finetuner.data.batches import Batch
from finetuner.data.token_store import IGNORE_INDEX, TokenStore
from finetuner.plan.parallel import ParallelPlan
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe.sections import EvaluationSection, OutputSection, ScheduleSection

EOS = 0  # and the number under the padding


def make_store(rows: int) -> TokenStore:
    """Row i is [i + 1, noise ..., EOS] of its own length; all but the first token are trained in every other row."""
    generator = np.random.default_rng(7)
    documents = []
    for i in range(rows):
        ids = np.array([i + 1, *generator.integers(1, 400, 1 + generator.integers(9)), EOS], dtype=np.int32)
        labels = ids.copy()
        labels[: 1 + (i % 2) * (len(ids) - 2)] = IGNORE_INDEX
        documents.append((ids, labels))
    return TokenStore.of(documents)


def make_plan(
    ranks: int = 1, micro: int = 1, accum: int = 1, rank: int = 0, seed: int = 3, eval_batch: int = 2
) -> Plan:
    return Plan(
        parallel=ParallelPlan(replicate=ranks), data_parallel_rank=rank, micro_batch=micro, grad_accum=accum,
        eval_batch=eval_batch, precision="fp32", seed=seed,
    )  # fmt: skip


def make_schedule(rows: int, plan: Plan, epochs: int = 1) -> Schedule:
    section = ScheduleSection(learning_rate=1.0, num_epochs=float(epochs))
    return Schedule.from_sections(
        section, EvaluationSection(), OutputSection(), num_rows=rows, global_batch=plan.global_batch
    )


def rows_of(batch: Batch) -> list[int]:
    """Which rows of make_store are in the batch; a filler is all zeros."""
    return [int(first) - 1 for first in batch.input_ids[:, 0]]


def all_ranks(plan: Plan) -> Iterator[Plan]:
    return (replace(plan, data_parallel_rank=rank) for rank in range(plan.data_parallel))
