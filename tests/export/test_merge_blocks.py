"""An update is added block by block: the bits are those of the whole product."""

import pytest
import torch

from finetuner.export.tensor_updates import BLOCK_ELEMENTS, MIN_ROWS, LowRankUpdate

SHAPES = [(3001, 701, 1), (1537, 2049, 64), (9000, 333, 256), (33, 90_001, 4), (2048, 2048, 16), (5, 300_001, 2)]


@pytest.mark.parametrize("with_magnitude", [False, True])
@pytest.mark.parametrize("stored_in_out", [False, True])
@pytest.mark.parametrize(("outs", "ins", "rank"), SHAPES)
def test_blocks_of_a_product_have_the_bits_of_the_whole(
    outs: int, ins: int, rank: int, stored_in_out: bool, with_magnitude: bool
) -> None:
    make = torch.Generator().manual_seed(outs)
    a, b = torch.randn(rank, ins, generator=make), torch.randn(outs, rank, generator=make)
    magnitude = torch.rand(outs, generator=make) if with_magnitude else None
    weight = torch.randn((ins, outs) if stored_in_out else (outs, ins), generator=make).bfloat16()
    delta = a.t() @ b.t() if stored_in_out else b @ a
    whole = delta.mul_(0.7).add_(weight)
    if magnitude is not None:
        along = 0 if stored_in_out else 1
        whole.mul_((magnitude / torch.linalg.vector_norm(whole, dim=along)).unsqueeze(along))

    merged = LowRankUpdate(0.7, stored_in_out, a, b, magnitude).apply(weight.clone())

    assert torch.equal(merged, whole.bfloat16())


def test_the_shapes_above_are_cut_into_blocks() -> None:
    cut = [outs * ins > 2 * BLOCK_ELEMENTS and outs > 2 * MIN_ROWS for outs, ins, _ in SHAPES]
    assert sum(cut) == len(SHAPES) - 1  # the last is too flat: one block
