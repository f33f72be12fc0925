"""fp16's loss scaler around the engine's step: a real one, on a CPU. Accelerate makes one for GPUs only, so the test
gives its Accelerator what it has there."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from finetuner.parallel.replicated import ReplicatedEngine

SCALE = 1024.0


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    made = Accelerator(cpu=True, gradient_accumulation_steps=2)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    made.native_amp, made.state._mixed_precision = True, "fp16"
    yield made
    for state in states:
        state._reset_state()


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def batches(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 8, generator=generator) for _ in range(2)]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def step_of(engine: ReplicatedEngine, rows: list[torch.Tensor], max_norm: float) -> tuple[float, bool]:
    for i, batch in enumerate(rows, 1):
        with engine.micro_batch(last=i == len(rows)):
            engine.backward(engine.module(batch).square().sum() / 8)
    return engine.update(max_norm, loss_is_finite=True)


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_steps_under_the_scaler_are_those_of_torchs_own_recipe_for_it(accelerator: Accelerator, max_norm: float):
    model = small_model()
    theirs = copy.deepcopy(model)
    engine = ReplicatedEngine(accelerator, model, lambda: make_optimizer(model))
    optimizer, scaler = make_optimizer(theirs), torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    for step in range(4):
        norm, updated = step_of(engine, batches(step), max_norm)
        for batch in batches(step):
            with torch.autocast("cpu", dtype=torch.float16):
                out = theirs(batch)
            scaler.scale(out.float().square().sum() / 8).backward()
        scaler.unscale_(optimizer)
        expected = torch.stack([p.grad.double().norm() for p in theirs.parameters()]).norm()
        nn.utils.clip_grads_with_norm_(theirs.parameters(), max_norm or math.inf, expected)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert updated and norm == pytest.approx(float(expected), rel=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    assert accelerator.scaler.get_scale() == scaler.get_scale() == 2 * SCALE


def test_a_gradient_that_overflows_leaves_the_weights_and_halves_the_scale(accelerator: Accelerator):
    model = small_model()
    engine = ReplicatedEngine(accelerator, model, lambda: make_optimizer(model))
    before = [p.detach().clone() for p in model.parameters()]
    norm, updated = step_of(engine, [rows * 1e6 for rows in batches(0)], 1.0)
    assert not updated and not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not engine.optimizer.state, "no moment knows of it"
    assert accelerator.scaler.get_scale() == SCALE / 2
    norm, updated = step_of(engine, batches(1), 1.0)
    assert updated and math.isfinite(norm)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
