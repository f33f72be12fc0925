"""The norm of a gradient is exact, and one function's in every engine."""

import math

import pytest
import torch
from torch import nn

from finetuner.parallel.gradient_norm import clip_factor, scale_, sum_of_squares

CPU = torch.device("cpu")


def test_the_norm_of_a_large_tensor_is_exact_and_does_not_depend_on_how_it_is_cut():
    torch.manual_seed(0)
    gradient = torch.randn(49_152, 128) / 3
    exact = float(gradient.double().norm())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own fp32 norm is 2e-4 too small here
    try:
        in_one = math.sqrt(float(sum_of_squares([gradient], CPU)))
        in_parts = math.sqrt(float(sum(sum_of_squares([part], CPU) for part in gradient.split(7_001))))
        by_torch = float(gradient.norm())
    finally:
        torch.set_num_threads(threads)
    assert in_one == pytest.approx(exact, rel=1e-12) and in_parts == pytest.approx(exact, rel=1e-12)
    assert abs(by_torch / exact - 1) > 1e-5, "if torch has mended it, the pieces are not needed any more"


@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (2, 1 << 17)])
def test_any_shape_is_summed(shape):
    tensor = torch.ones(shape)
    assert float(sum_of_squares([tensor, tensor.t() if tensor.ndim == 2 else tensor], CPU)) == pytest.approx(
        2 * tensor.numel()
    )


@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"),
    [(2.0, 1.0, 1.0 / (2.0 + 1e-6)), (0.5, 1.0, 1.0), (5.0, 0.0, 1.0), (math.inf, 1.0, 1.0), (math.nan, 1.0, 1.0)],
)
def test_clipping_follows_torch(norm, max_norm, factor):
    assert clip_factor(norm, max_norm) == factor


def test_a_clipped_gradient_is_torchs():
    mine, theirs = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64, 64))
    mine.grad, theirs.grad = torch.full((64, 64), 0.5), torch.full((64, 64), 0.5)
    norm = math.sqrt(float(sum_of_squares([mine.grad], CPU)))
    scale_([mine.grad], clip_factor(norm, 1.0))
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_([theirs], 1.0)))
    torch.testing.assert_close(mine.grad, theirs.grad)
