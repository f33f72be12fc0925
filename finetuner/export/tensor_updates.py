"""Updates that an adapter makes to single tensors of its base: added low-rank products, replaced rows or tensors.

Each computes in fp32 and rounds once, at the end. A tensor of a linear layer is (out, in); some architectures (GPT-2)
store it as (in, out).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch

from finetuner.errors import ModelError

BLOCK_ELEMENTS = 1 << 18  # elements of a product that are computed at once: 1 MB in fp32
MIN_ROWS = 16  # of a block: fewer take another path through the matrix library, which rounds differently


class TensorUpdate(Protocol):
    """Update of one tensor of the base."""

    @abstractmethod
    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the updated tensor `name`. Raises ModelError if the update does not fit the base."""

    @abstractmethod
    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the updated tensor, in the number format of `weight`, whose memory it may take.

        Any shape in, `shape_after` of it out."""


@dataclass(frozen=True)
class LowRankUpdate:
    """V = W + scale * B A; with DoRA (arXiv:2402.09353, equation 5) each row of V, one per output, is scaled to the
    length in `magnitude`."""

    scale: float
    stored_in_out: bool  # the base stores W as (in, out)
    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (out, rank)
    magnitude: torch.Tensor | None = None  # (out,)

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        delta = (self.b.shape[0], self.a.shape[1])
        delta = delta[::-1] if self.stored_in_out else delta
        if delta != shape:
            raise ModelError(shape_mismatch_message(name, shape, delta))
        return shape

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in), or (in, out) if stored so; updated in place.

        Over blocks of rows that stay in the processor's cache: a full product in fp32 costs more in fresh pages than
        in arithmetic."""
        left, right = (self.a.t(), self.b.t()) if self.stored_in_out else (self.b, self.a)
        along = 0 if self.stored_in_out else 1
        by_column = self.magnitude is not None and self.stored_in_out
        blocks = 1 if by_column else max(1, min(len(weight) // MIN_ROWS, weight.numel() // BLOCK_ELEMENTS))
        lengths = [None] * blocks if self.magnitude is None else self.magnitude.float().tensor_split(blocks)
        right = right.float()
        for rows, left_rows, length in zip(
            weight.tensor_split(blocks), left.float().tensor_split(blocks), lengths, strict=True
        ):
            merged = (left_rows @ right).mul_(self.scale).add_(rows)
            if length is not None:
                merged.mul_((length / torch.linalg.vector_norm(merged, dim=along)).unsqueeze(along))
            rows.copy_(merged)
        return weight


@dataclass(frozen=True)
class VocabularyRows:
    """Replaced rows `ids` of a vocabulary table, which grows by those that it does not have."""

    rows: torch.Tensor  # (len(ids), width)
    ids: tuple[int, ...]

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.rows.shape[1] != shape[1]:
            raise ModelError(shape_mismatch_message(name, shape, tuple(self.rows.shape)))
        return (max(shape[0], max(self.ids) + 1), shape[1])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """(vocabulary, width) in, (grown vocabulary, width) out."""
        grown = weight.new_zeros(max(weight.shape[0], max(self.ids) + 1), weight.shape[1])
        grown[: len(weight)] = weight
        grown[list(self.ids)] = self.rows.to(weight.dtype)
        return grown


@dataclass(frozen=True)
class Replacement:
    """A tensor in the place of the base's; a vocabulary table may have grown."""

    tensor: torch.Tensor

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        after = tuple(self.tensor.shape)
        grown = len(shape) == 2 and after[1:] == shape[1:] and after[0] >= shape[0]
        if after != shape and not grown:
            raise ModelError(shape_mismatch_message(name, shape, after))
        return after

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Any shape in; the replacement's shape out."""
        return self.tensor.to(weight.dtype, copy=True)


@dataclass(frozen=True)
class ScaledAddition:
    """W + scale * tensor: a bias of the adapter's own."""

    scale: float
    tensor: torch.Tensor

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if tuple(self.tensor.shape) != shape:
            raise ModelError(shape_mismatch_message(name, shape, tuple(self.tensor.shape)))
        return shape

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Any shape, that of `tensor`."""
        return (self.tensor.float() * self.scale).add_(weight).to(weight.dtype)


@dataclass(frozen=True)
class UpdateSequence:
    """Two updates of one tensor: a table that came with the adapter, and a low-rank update of it."""

    first: TensorUpdate
    then: TensorUpdate

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.then.shape_after(name, self.first.shape_after(name, shape))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Any shape in, `shape_after` of it out; rounded once, after the second update."""
        return self.then.apply(self.first.apply(weight.float())).to(weight.dtype)


def same_update(head: TensorUpdate, embedding: TensorUpdate) -> bool:
    """Whether both updates turn one tied table into the same tensor."""
    match head, embedding:
        case Replacement(), Replacement():
            return torch.equal(head.tensor, embedding.tensor)
        case VocabularyRows(), VocabularyRows():
            return head.ids == embedding.ids and torch.equal(head.rows, embedding.rows)
        case UpdateSequence(), UpdateSequence():
            return same_update(head.first, embedding.first) and same_update(head.then, embedding.then)
        case LowRankUpdate(), LowRankUpdate():  # a head's halves are an embedding's, transposed
            same_halves = torch.equal(head.a, embedding.b.t()) and torch.equal(head.b, embedding.a.t())
            return head.scale == embedding.scale and same_halves
    return False


def shape_mismatch_message(name: str, base: tuple[int, ...], adapter: tuple[int, ...]) -> str:
    """Message for an update whose shape is not that of the base's tensor `name`."""
    return (
        f"the adapter does not fit the base model: '{name}' has shape {base} in the base and {adapter} in the adapter. "
        "Was it trained on another base?"
    )
