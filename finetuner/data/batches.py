"""Documents -> the micro-batches of a step.

A pure function of (store, plan, step): resuming needs no iterator's state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.data.shuffling import order_by_length, row_order
from finetuner.data.token_store import IGNORE, Document, Ids, Rows
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe.sections import PackingSection

FILLER_ROW = -1


@dataclass(frozen=True)
class Layout:
    """How rows lie in a batch.

    `packed`: rows hold several documents, told apart by positions that begin anew; `flat`: all rows of a micro-batch
    are laid end to end into one, which is how flash attention wants documents. `joined`: the documents of a row are
    one, which goes on from each to the next. `pad_to`: tokens of every row.
    """

    packed: bool = False
    flat: bool = False
    joined: bool = False
    pad_to: int | None = None
    by_length: bool = False


PADDED = Layout()


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows padded on the right to the longest, and what to predict from where.

    `input_ids`: (rows, length). Either `attention_mask` of that shape is given, or, if packed, `position_ids`, which
    begin anew with each document and with the padding. `positions`: (trained,) places in the flattened
    (rows * length) hidden states whose next token is trained on; `targets`: (trained,) those next tokens. Both are
    made on the CPU, since finding them on a GPU would make it wait.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    positions: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # without padding
    position_ids: torch.Tensor | None = None
    num_pairs: int = 0  # T^2, summed over the documents of T tokens

    @property
    def num_trained(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=moved(self.input_ids),
            attention_mask=None if self.attention_mask is None else moved(self.attention_mask),
            positions=moved(self.positions),
            targets=moved(self.targets),
            num_tokens=self.num_tokens,
            position_ids=None if self.position_ids is None else moved(self.position_ids),
            num_pairs=self.num_pairs,
        )

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from without the CPU's help."""
        return Batch(
            input_ids=self.input_ids.pin_memory(),
            attention_mask=None if self.attention_mask is None else self.attention_mask.pin_memory(),
            positions=self.positions.pin_memory(),
            targets=self.targets.pin_memory(),
            num_tokens=self.num_tokens,
            position_ids=None if self.position_ids is None else self.position_ids.pin_memory(),
            num_pairs=self.num_pairs,
        )


def step_batches(rows: Rows, plan: Plan, schedule: Schedule, step: int, layout: Layout = PADDED) -> list[Batch]:
    """This rank's `grad_accum` micro-batches of a step, of nearly equal length across ranks.

    The rows of the global batch are dealt longest first, pass by pass and within a pass rank by rank. The loss is
    normalised by the whole global batch, so the dealing changes the padding and not the result. Where an epoch's last
    step has too few rows for all, a filler row without a trained token keeps the ranks in step.
    """
    return dealt(rows, _rows_of_step(rows, plan, schedule, step, layout), plan, layout)


def dealt(rows: Rows, of_step: list[int], plan: Plan, layout: Layout) -> list[Batch]:
    """This rank's micro-batches of these rows, which are ordered longest first."""
    per_pass = plan.data_parallel * plan.micro_batch
    batches = []
    for accum in range(plan.grad_accum):
        of_pass = of_step[accum * per_pass : (accum + 1) * per_pass]
        mine = of_pass[plan.rank :: plan.data_parallel]
        batches.append(collate(rows, mine or [FILLER_ROW], layout))
    return batches


def _rows_of_step(rows: Rows, plan: Plan, schedule: Schedule, step: int, layout: Layout) -> list[int]:
    """The global batch of a step, longest row first."""
    epoch, start, stop = schedule.rows_at(step)
    if layout.by_length:
        order = _remembered_order(rows, plan.seed, epoch, schedule.global_batch)
    else:
        order = row_order(plan.seed, epoch, schedule.num_rows)
    # stable: equal lengths keep the seeded order
    return sorted((int(row) for row in order[start:stop]), key=rows.length, reverse=True)


@lru_cache(maxsize=2)
def _remembered_order(rows: Rows, seed: int, epoch: int, global_batch: int) -> NDArray[np.int64]:
    return order_by_length(seed, epoch, rows.lengths, global_batch)


def evaluation_batches(
    rows: Rows, plan: Plan, layout: Layout = PADDED, *, numbers: range | None = None
) -> Iterator[Batch]:
    """This rank's share of the rows with these numbers (default: all), sorted by length; the same number of batches on
    every rank."""
    ordered = sorted(range(len(rows)) if numbers is None else numbers, key=rows.length, reverse=True)
    groups = [ordered[i : i + plan.eval_batch] for i in range(0, len(ordered), plan.eval_batch)]
    while len(groups) % plan.data_parallel:
        groups.append([FILLER_ROW])
    for group in groups[plan.rank :: plan.data_parallel]:
        yield collate(rows, group, layout)


def padding_share(rows: Rows, plan: Plan, schedule: Schedule, layout: Layout, *, max_steps: int = 200) -> float:
    """The share of the tokens computed that are padding, over the first steps and all ranks."""
    tokens = computed = 0
    for step in range(min(schedule.steps_of_first_epoch, schedule.total_steps, max_steps)):
        of_step = [rows.length(row) for row in _rows_of_step(rows, plan, schedule, step, layout)]
        per_pass = plan.data_parallel * plan.micro_batch
        for start in range(0, len(of_step), per_pass):
            of_pass = of_step[start : start + per_pass]
            for rank in range(plan.data_parallel):
                mine = of_pass[rank :: plan.data_parallel]
                tokens += sum(mine)
                if layout.pad_to is not None:
                    computed += len(mine) * layout.pad_to
                else:
                    computed += sum(mine) if layout.flat else len(mine) * max(mine, default=0)
    return 1 - tokens / computed


_FILLER = (np.zeros(2, dtype=np.int32), np.full(2, IGNORE, np.int32))


def collate(rows: Rows, numbers: list[int], layout: Layout = PADDED) -> Batch:
    """Lay rows out, padded on the right. FILLER_ROW stands for two tokens that nothing is learned from."""
    documents = [[_FILLER] if number == FILLER_ROW else rows.documents(number) for number in numbers]
    if layout.joined:
        documents = [[as_one(row)] for row in documents]
    lengths = [len(ids) for row in documents for ids, _ in row] if numbers != [FILLER_ROW] else []
    length = layout.pad_to
    if layout.flat:
        documents = [[document for row in documents for document in row]]
        length = length and length * len(numbers)
    if length is None:
        length = max(sum(len(ids) for ids, _ in row) for row in documents)
    input_ids = np.zeros((len(documents), length), dtype=np.int64)  # what stands in the padding is never read
    mask = np.zeros_like(input_ids)
    positions = np.zeros_like(input_ids)
    following = np.full_like(input_ids, IGNORE)  # the label of the next token of the same document
    for i, row in enumerate(documents):
        at = 0
        for ids, labels in row:
            _lay(i, at, ids, labels, input_ids, positions, following)
            at += len(ids)
        mask[i, :at] = 1
        positions[i, at:] = np.arange(length - at)  # the padding is a document of its own
    (places,) = np.nonzero(following.ravel() != IGNORE)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if layout.packed else torch.from_numpy(mask),
        positions=torch.from_numpy(places),
        targets=torch.from_numpy(following.ravel()[places]),
        num_tokens=sum(lengths),
        num_pairs=sum(length * length for length in lengths),
        position_ids=torch.from_numpy(positions) if layout.packed else None,
    )


def as_one(documents: Sequence[Document]) -> Document:
    """Documents that see each other are one."""
    return np.concatenate([ids for ids, _ in documents]), np.concatenate([labels for _, labels in documents])


def _lay(
    row: int,
    at: int,
    ids: Ids,
    labels: Ids,
    input_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    following: NDArray[np.int64],
) -> None:
    stop = at + len(ids)
    input_ids[row, at:stop] = ids
    positions[row, at:stop] = np.arange(len(ids))
    following[row, at : stop - 1] = labels[1:]


def layout_of(section: PackingSection, sequence_len: int, *, packed: bool, flat: bool) -> Layout:
    """Return the layout of a recipe's rows. `flat`: if they are packed, the model wants them end to end."""
    return Layout(
        packed=packed,
        flat=packed and flat,
        joined=packed and not section.pretrain_multipack_attn,
        pad_to=sequence_len if section.pad_to_sequence_len else None,
        by_length=section.group_by_length,
    )
