"""Documents -> the micro-batches of a step.

A pure function of (store, plan, step): resuming needs no iterator's state.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from finetuner.data.order import row_order
from finetuner.data.tokens import IGNORE, TokenStore
from finetuner.plan import Plan, Schedule

FILLER_ROW = -1


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows padded on the right to the longest, and what to predict from where.

    `input_ids`, `attention_mask`: (rows, length). `positions`: (trained,) places in the flattened (rows * length)
    hidden states whose next token is trained on; `targets`: (trained,) those next tokens. Both are made on the CPU,
    since finding them on a GPU would make it wait.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # without padding

    @property
    def num_trained(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=moved(self.input_ids),
            attention_mask=moved(self.attention_mask),
            positions=moved(self.positions),
            targets=moved(self.targets),
            num_tokens=self.num_tokens,
        )


def step_batches(store: TokenStore, plan: Plan, schedule: Schedule, step: int) -> list[Batch]:
    """This rank's `grad_accum` micro-batches of a step, of nearly equal length across ranks.

    The rows of the global batch are dealt longest first, pass by pass and within a pass rank by rank. The loss is
    normalised by the whole global batch, so the dealing changes the padding and not the result. Where an epoch's last
    step has too few rows for all, a filler row without a trained token keeps the ranks in step.
    """
    epoch, start, stop = schedule.rows_at(step)
    rows = [int(row) for row in row_order(plan.seed, epoch, schedule.num_rows)[start:stop]]
    rows.sort(key=store.length, reverse=True)  # stable: equal lengths keep the seeded order
    per_pass = plan.data_parallel * plan.micro_batch
    batches = []
    for accum in range(plan.grad_accum):
        of_pass = rows[accum * per_pass : (accum + 1) * per_pass]
        mine = of_pass[plan.rank :: plan.data_parallel]
        batches.append(collate(store, mine or [FILLER_ROW]))
    return batches


def evaluation_batches(store: TokenStore, plan: Plan) -> Iterator[Batch]:
    """This rank's share of all rows, sorted by length; the same number of batches on every rank."""
    rows = sorted(range(len(store)), key=store.length, reverse=True)
    groups = [rows[i : i + plan.eval_batch] for i in range(0, len(rows), plan.eval_batch)]
    while len(groups) % plan.data_parallel:
        groups.append([FILLER_ROW])
    for group in groups[plan.rank :: plan.data_parallel]:
        yield collate(store, group)


def collate(store: TokenStore, rows: list[int]) -> Batch:
    """Pad `rows` on the right. FILLER_ROW stands for two tokens that nothing is learned from."""
    filler = np.zeros(2, dtype=np.int32)
    documents = [(filler, np.full(2, IGNORE, np.int32)) if row == FILLER_ROW else store.document(row) for row in rows]
    length = max(len(ids) for ids, _ in documents)
    input_ids = np.zeros((len(documents), length), dtype=np.int64)  # what stands under a zero of the mask is never read
    mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORE)
    for i, (ids, document_labels) in enumerate(documents):
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = document_labels
    following = np.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:]
    (positions,) = np.nonzero(following.ravel() != IGNORE)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(following.ravel()[positions]),
        num_tokens=int(mask.sum()) if rows != [FILLER_ROW] else 0,
    )
