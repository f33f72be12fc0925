"""The objective on held-out rows, source by source; the same at every batch size and on any number of ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from finetuner.data.batch_sampler import evaluation_batches
from finetuner.data.batches import BatchLayout
from finetuner.data.prepared_data import SourceRange
from finetuner.data.token_store import TokenRows
from finetuner.objectives.base import Objective, figure_means, step_loss
from finetuner.objectives.text_score import TextScore
from finetuner.parallel.engine import Engine
from finetuner.plan.run import Plan
from finetuner.training.records import EvaluationRecord


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, how they lie in a batch, and the sources they are of (none: all are of one).

    `token_bytes`: bytes of text that each token stands for, where they are known.
    """

    rows: TokenRows
    layout: BatchLayout
    parts: tuple[SourceRange, ...] = ()
    token_bytes: tuple[int, ...] | None = None


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    engine: Engine,
    objective: Objective,
    plan: Plan,
    held_out: HeldOut,
    step: int,
    report: Callable[[int], None] = lambda num_rows: None,
) -> EvaluationRecord:
    """Return the held-out loss after `step` steps. `report` is told of rows that this rank has evaluated."""
    device = accelerator.device
    parts = held_out.parts or (SourceRange("", 0, len(held_out.rows)),)
    num_bytes_of = torch.tensor(held_out.token_bytes or (), device=device)
    num_terms, num_sums = len(objective.terms), len(objective.terms) + len(objective.figures)
    # one row for each source: K sums and F figures, K counts, bytes
    width = num_sums + num_terms + 1
    wide = torch.float64 if device.type != "mps" else torch.float32
    table = torch.zeros((len(parts), width), dtype=wide, device=device)
    with _evaluation_mode(engine.module):
        for row, part in zip(table, parts, strict=True):
            numbers = range(part.start, part.stop)
            for host_batch in evaluation_batches(held_out.rows, plan, held_out.layout, numbers=numbers):
                batch = host_batch.to(device)
                row[:num_sums] += engine.module(batch.tensors())
                row[num_sums:-1] += torch.tensor(objective.counts(batch), device=device)
                row[-1] += num_bytes_of[batch.targets].sum() if len(num_bytes_of) else 0
                report(len(batch.input_ids))
    by_part = [
        _Totals(one[:num_sums], [int(count) for count in one[num_sums:-1]], int(one[-1]))
        for one in accelerator.reduce(table, "sum").tolist()
    ]
    return _row(objective, by_part, [part.name for part in parts], step)


@dataclass(frozen=True)
class _Totals:
    """Sums (K + F,), counts (K,) and bytes of text of some rows."""

    sums: list[float]
    counts: list[int]
    num_bytes: int


def _row(objective: Objective, by_part: list[_Totals], names: list[str], step: int) -> EvaluationRecord:
    everything = _Totals(
        [sum(values) for values in zip(*(part.sums for part in by_part), strict=True)],
        [sum(values) for values in zip(*(part.counts for part in by_part), strict=True)],
        sum(part.num_bytes for part in by_part),
    )
    text = None
    if objective.text_term is not None:
        k = objective.text_term
        text = TextScore(everything.sums[k], everything.counts[k], everything.num_bytes)
    return EvaluationRecord(
        step=step,
        loss=step_loss(objective, everything.sums, everything.counts),
        perplexity=None if text is None else text.perplexity,
        bits_per_byte=text.bits_per_byte if text is not None and text.num_bytes else None,
        figures=figure_means(objective, everything.sums, everything.counts),
        by_source={
            name: step_loss(objective, part.sums, part.counts) for name, part in zip(names, by_part, strict=True)
        }
        if len(by_part) > 1
        else {},
    )


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    module.eval()
    yield
    module.train()
