"""Micro-batches as tensors: rows of documents, padded or packed, and which of their tokens are trained on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from finetuner.data.token_store import IGNORE_INDEX, Document, TokenRows, join_documents
from finetuner.recipe.sections import PackingSection

FILLER_ROW = -1  # the number of a row that is not in the data: two tokens, neither trained on

# name -> tensor of a batch, as objectives read it. A plain dict: engines move and cast the tensors in it.
BatchTensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class BatchLayout:
    """Options by which rows become the tensors of a batch.

    `packed`: a row holds several documents, told apart by position ids that restart at 0. `flat`: all rows of a
    micro-batch are laid end to end into one, as flash attention takes documents. `joined`: the documents of a row are
    one text, whose tokens see each other. `pad_to`: tokens of every row (default: those of the longest). `by_length`:
    the rows of one step have similar lengths.
    """

    packed: bool = False
    flat: bool = False
    joined: bool = False
    pad_to: int | None = None
    by_length: bool = False


PADDED = BatchLayout()


def layout_of(section: PackingSection, sequence_len: int, *, packed: bool, flat: bool) -> BatchLayout:
    """Return the layout that a recipe asks for. `flat`: the model's attention takes packs end to end."""
    return BatchLayout(
        packed=packed,
        flat=packed and flat,
        joined=packed and not section.pretrain_multipack_attn,
        pad_to=sequence_len if section.pad_to_sequence_len else None,
        by_length=section.group_by_length,
    )


@dataclass(frozen=True)
class Batch:
    """One micro-batch: int64 tensors, with rows padded on the right.

    `input_ids`: (rows, length). `attention_mask`: (rows, length), 0 at padding; None if rows are packed.
    `position_ids`: (rows, length), restarting at 0 with each document and with the padding; None unless packed.
    `positions`: (trained,) indices into the flattened (rows * length) hidden states whose next token is trained on;
    `targets`: (trained,) those next tokens. Both are computed on the CPU: finding them on a GPU would make it wait.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    positions: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # without padding
    position_ids: torch.Tensor | None = None
    num_pairs: int = 0  # T^2, summed over the documents of T tokens: the work of attention

    @property
    def num_trained(self) -> int:
        """Tokens of the batch that are trained on."""
        return len(self.targets)

    def tensors(self) -> BatchTensors:
        """Return the tensors that LossModule takes, by name; one of `attention_mask` and `position_ids` is None."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "positions": self.positions,
            "targets": self.targets,
            "position_ids": self.position_ids,
        }

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on the device; asynchronous if this batch is in pinned memory."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory, from which a GPU copies without the CPU's help."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            input_ids=function(self.input_ids),
            attention_mask=None if self.attention_mask is None else function(self.attention_mask),
            positions=function(self.positions),
            targets=function(self.targets),
            position_ids=None if self.position_ids is None else function(self.position_ids),
        )


_FILLER = (np.zeros(2, dtype=np.int32), np.full(2, IGNORE_INDEX, np.int32))


def collate(rows: TokenRows, numbers: list[int], layout: BatchLayout = PADDED) -> Batch:
    """Return the rows of these numbers as one Batch of shape (len(numbers), length), or (1, length) if flat.

    FILLER_ROW stands for a row of two tokens, neither trained on; a batch of it alone counts no tokens.
    """
    by_row = _arrange(rows, numbers, layout)
    lengths = [len(ids) for documents in by_row for ids, _ in documents] if numbers != [FILLER_ROW] else []
    shape = (len(by_row), _padded_length(by_row, len(numbers), layout))

    input_ids = np.zeros(shape, dtype=np.int64)  # the ids in the padding are never read
    mask = np.zeros_like(input_ids)
    position_ids = np.zeros_like(input_ids)
    next_labels = np.full_like(input_ids, IGNORE_INDEX)  # at each token, the label of the next one of its document
    for i, documents in enumerate(by_row):
        stop = 0
        for ids, labels in documents:
            start, stop = stop, stop + len(ids)
            input_ids[i, start:stop] = ids
            position_ids[i, start:stop] = np.arange(len(ids))
            next_labels[i, start : stop - 1] = labels[1:]
        mask[i, :stop] = 1
        position_ids[i, stop:] = np.arange(shape[1] - stop)  # the padding is a document of its own
    (positions,) = np.nonzero(next_labels.ravel() != IGNORE_INDEX)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if layout.packed else torch.from_numpy(mask),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(next_labels.ravel()[positions]),
        num_tokens=sum(lengths),
        num_pairs=sum(length * length for length in lengths),
        position_ids=torch.from_numpy(position_ids) if layout.packed else None,
    )


def _arrange(rows: TokenRows, numbers: list[int], layout: BatchLayout) -> list[list[Document]]:
    """Return the documents of each row of the batch."""
    by_row = [[_FILLER] if number == FILLER_ROW else rows.documents(number) for number in numbers]
    if layout.joined:
        by_row = [[join_documents(documents)] for documents in by_row]
    if layout.flat:
        by_row = [[document for documents in by_row for document in documents]]
    return by_row


def _padded_length(by_row: list[list[Document]], num_rows: int, layout: BatchLayout) -> int:
    """Tokens of each row of the batch, with padding; `num_rows` counts the rows before they were laid end to end."""
    if layout.pad_to is not None:
        return layout.pad_to * num_rows if layout.flat else layout.pad_to
    return max(sum(len(ids) for ids, _ in documents) for documents in by_row)
