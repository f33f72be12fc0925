"""Choose the rows of each rank's micro-batches: a pure function of (rows, plan, step), so resuming needs no state."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetuner.data.batches import FILLER_ROW, PADDED, Batch, BatchLayout, collate
from finetuner.data.shuffling import row_order, row_order_by_length
from finetuner.data.token_store import TokenRows
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule


def step_batches(
    rows: TokenRows, plan: Plan, schedule: Schedule, step: int, layout: BatchLayout = PADDED
) -> list[Batch]:
    """Return this rank's `grad_accum` micro-batches of a step (see Batch for the shapes).

    The rows of the global batch are dealt longest first, micro-batch by micro-batch and within one rank by rank, so
    that micro-batches that run at the same time have nearly equal lengths. The loss is normalized by the whole global
    batch, so this changes the padding and not the result. Where an epoch's last step has too few rows for all ranks, a
    filler row without a trained token keeps them in step.
    """
    return rank_batches(rows, _rows_of_step(rows, plan, schedule, step, layout), plan, layout)


def rank_batches(rows: TokenRows, longest_first: list[int], plan: Plan, layout: BatchLayout) -> list[Batch]:
    """Return this rank's micro-batches of a global batch, whose row numbers are given longest row first."""
    rows_at_once = plan.data_parallel * plan.micro_batch
    batches = []
    for accum in range(plan.grad_accum):
        of_all_ranks = longest_first[accum * rows_at_once : (accum + 1) * rows_at_once]
        of_this_rank = of_all_ranks[plan.data_parallel_rank :: plan.data_parallel]
        batches.append(collate(rows, of_this_rank or [FILLER_ROW], layout))
    return batches


def _rows_of_step(rows: TokenRows, plan: Plan, schedule: Schedule, step: int, layout: BatchLayout) -> list[int]:
    """Return the row numbers of a step's global batch, longest row first."""
    epoch, start, stop = schedule.rows_at(step)
    if layout.by_length:
        order = _cached_order_by_length(rows, plan.seed, epoch, schedule.global_batch)
    else:
        order = row_order(plan.seed, epoch, schedule.num_rows)
    # stable: equal lengths stay in the seeded order
    return sorted((int(row) for row in order[start:stop]), key=rows.length, reverse=True)


@lru_cache(maxsize=2)
def _cached_order_by_length(rows: TokenRows, seed: int, epoch: int, global_batch: int) -> NDArray[np.int64]:
    return row_order_by_length(seed, epoch, rows.lengths, global_batch)


def evaluation_batches(
    rows: TokenRows, plan: Plan, layout: BatchLayout = PADDED, *, numbers: range | None = None
) -> Iterator[Batch]:
    """Yield this rank's batches of the rows with these numbers (default: all), sorted by length.

    Every rank yields the same number of batches: those that have no rows left yield a filler row.
    """
    ordered = sorted(range(len(rows)) if numbers is None else numbers, key=rows.length, reverse=True)
    groups = [ordered[i : i + plan.eval_batch] for i in range(0, len(ordered), plan.eval_batch)]
    while len(groups) % plan.data_parallel:
        groups.append([FILLER_ROW])
    for group in groups[plan.data_parallel_rank :: plan.data_parallel]:
        yield collate(rows, group, layout)


def padding_share(
    rows: TokenRows, plan: Plan, schedule: Schedule, layout: BatchLayout, *, max_steps: int = 200
) -> float:
    """Return the share (0 to 1) of padding among the tokens computed in `max_steps` steps, over all ranks."""
    num_tokens = num_computed = 0
    rows_at_once = plan.data_parallel * plan.micro_batch
    for step in range(min(schedule.steps_of_first_epoch, schedule.total_steps, max_steps)):
        lengths = [rows.length(row) for row in _rows_of_step(rows, plan, schedule, step, layout)]
        for start in range(0, len(lengths), rows_at_once):
            of_all_ranks = lengths[start : start + rows_at_once]
            for rank in range(plan.data_parallel):
                micro_batch = of_all_ranks[rank :: plan.data_parallel]
                num_tokens += sum(micro_batch)
                if layout.pad_to is not None:
                    num_computed += len(micro_batch) * layout.pad_to
                else:
                    num_computed += sum(micro_batch) if layout.flat else len(micro_batch) * max(micro_batch, default=0)
    return 1 - num_tokens / num_computed
