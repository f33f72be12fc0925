"""The arithmetic of a run: batch, precision, steps, learning rates, and when things happen."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import many, when

from finetuner.errors import PlanError
from finetuner.plan.precision import choose_precision
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule, ceil_of
from finetuner.recipe import load_recipe
from finetuner.recipe.sections import EvaluationSection, OutputSection, PrecisionSection, ScheduleSection, Section
from finetuner.world import (
    World,
    refuse_a_launch_that_lost_its_ranks,
    require_a_gpu_for_each,
    threads_for_a_rank,
)

CPU, CPU_BF16 = World(), World(bf16=True)
GPU, OLD_GPU = World(device="cuda", bf16=True), World(device="cuda")


def schedule(num_rows: int = 100, global_batch: int = 10, **keys: Any) -> Schedule:
    """A schedule of these recipe keys; 10 steps an epoch unless told otherwise."""
    keys = {"learning_rate": 1.0} | keys

    def of(section: type[Section]) -> Any:
        return section.model_validate({key: value for key, value in keys.items() if key in section.model_fields})

    return Schedule.from_sections(
        of(ScheduleSection), of(EvaluationSection), of(OutputSection), num_rows=num_rows, global_batch=global_batch
    )


# --- batch and precision ---


@pytest.mark.parametrize(
    ("ranks", "micro", "accum", "rows", "equation"),
    [
        (1, 1, 1, 1, "1 rows = 1 rank x 1 micro-batch x 1 accumulation"),
        (2, 4, 8, 64, "64 rows = 2 ranks x 4 micro-batch x 8 accumulation"),
        (3, 5, 1, 15, "15 rows = 3 ranks x 5 micro-batch x 1 accumulation"),
    ],
)
def test_global_batch_is_ranks_times_micro_batch_times_accumulation(
    write_recipe: Callable[..., Path], ranks: int, micro: int, accum: int, rows: int, equation: str
) -> None:
    recipe = load_recipe(write_recipe(micro_batch_size=micro, gradient_accumulation_steps=accum, seed=5))
    plan = Plan.from_recipe(recipe, World(size=ranks, rank=ranks - 1))
    assert (plan.global_batch, plan.batch_equation) == (rows, equation)
    assert (plan.data_parallel_rank, plan.seed, plan.eval_batch) == (ranks - 1, 5, micro)
    assert plan.schedule(recipe, num_rows=64).global_batch == rows


def test_evaluation_has_its_own_batch_when_told(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(micro_batch_size=2, eval_batch_size=7))
    assert Plan.from_recipe(recipe, CPU).eval_batch == 7


@pytest.mark.parametrize(
    ("keys", "world", "precision"),
    [
        ({}, CPU, "fp32"),
        ({}, CPU_BF16, "bf16"),
        ({}, GPU, "bf16"),
        ({}, OLD_GPU, "fp32"),
        ({"bf16": True}, CPU, "bf16"),
        ({"bf16": True}, GPU, "bf16"),
        ({"bf16": False}, GPU, "fp32"),
        ({"fp16": True}, GPU, "fp16"),
        ({"fp16": True, "bf16": False}, OLD_GPU, "fp16"),
    ],
)
def test_precision_follows_the_recipe_and_auto_the_device(keys: dict[str, Any], world: World, precision: str) -> None:
    assert choose_precision(PrecisionSection(**keys), world) == precision


@pytest.mark.parametrize(
    ("keys", "world", "message"),
    [
        ({"fp16": True}, CPU, "fp16 needs a GPU, and this rank runs on cpu. Write `fp16: false`."),
        ({"fp16": True}, World(device="mps"), "this rank runs on mps"),
        ({"bf16": True}, OLD_GPU, "this GPU has no bfloat16. Write `bf16: auto`"),
    ],
)
def test_a_precision_the_device_lacks_is_refused(keys: dict[str, Any], world: World, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose_precision(PrecisionSection(**keys), world)


# --- how many steps ---


@pytest.mark.parametrize(
    ("rows", "batch", "keys", "total"),
    [
        (100, 10, {}, 10),
        (101, 10, {}, 11),
        (1, 64, {}, 1),
        (101, 10, {"num_epochs": 2.0}, 22),
        (100, 10, {"num_epochs": 0.05}, 1),
        (100, 10, {"num_epochs": 0.5}, 5),
        (100, 10, {"num_epochs": 2.25}, 23),
        (100, 10, {"num_epochs": 1.1}, 11),  # 1.1 * 10 is 11.000000000000002 in floats
        (300, 10, {"num_epochs": 0.1}, 3),
        (100, 10, {"max_steps": 3}, 3),
        (100, 10, {"max_steps": 999, "num_epochs": 1.0}, 999),
    ],
)
def test_number_of_steps(rows: int, batch: int, keys: dict[str, Any], total: int) -> None:
    assert schedule(rows, batch, **keys).total_steps == total


@pytest.mark.parametrize(
    ("keys", "warmup"),
    [
        ({}, 0),
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 100}, 100),
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_ratio": 0.005}, 1),
        ({"warmup_ratio": 0.07}, 7),  # 0.07 * 100 is 7.000000000000001 in floats
        ({"warmup_ratio": 1.0}, 100),
    ],
)
def test_warmup_is_steps_or_a_share_of_all(keys: dict[str, Any], warmup: int) -> None:
    assert schedule(max_steps=100, **keys).warmup_steps == warmup


def test_a_warmup_longer_than_the_run_is_refused_with_both_numbers() -> None:
    message = "the warmup of 101 steps is longer than the run of 100 steps.\nWrite `warmup_steps: 10`"
    with pytest.raises(PlanError, match=message):
        schedule(max_steps=100, warmup_steps=101)


@many
@given(share=st.integers(0, 10**6), digits=st.integers(0, 6), count=st.integers(1, 10**6))
def test_a_share_is_rounded_up_as_a_decimal_not_as_a_float(share: int, digits: int, count: int) -> None:
    assert ceil_of(share / 10**digits, count) == -(-share * count // 10**digits)


# --- learning rate ---


def reference_curve(shape: str, total: int, warmup: int) -> list[float]:
    """What transformers' own scheduler gives to an optimizer with a peak of 1."""
    import torch
    from transformers import (
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if shape == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[shape]
        scheduler = make(optimizer, warmup, total)
    curve = []
    for _ in range(total):
        curve.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return curve


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 0.2}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 0.25, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear", "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "1-sqrt", "warmup_type": "1-sqrt",
                             "min_lr_ratio": 0.1, "num_stable_steps": 8}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("shape", "options"), OPTIONS)
@pytest.mark.parametrize(("total", "warmup"), [(37, 0), (37, 5)])
def test_shapes_with_options_are_those_of_transformers(
    shape: str, options: dict[str, Any], total: int, warmup: int
) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(shape, optimizer, warmup, total, scheduler_specific_kwargs=options)
    ours = schedule(
        max_steps=total, warmup_steps=warmup, lr_scheduler=shape, lr_scheduler_kwargs=options, learning_rate=0.5
    )
    for step in range(total):
        assert ours.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_a_cosine_that_settles_reaches_its_floor_early_and_stays() -> None:
    early = schedule(max_steps=50, warmup_steps=10, cosine_min_lr_ratio=0.1, cosine_constant_lr_ratio=0.8)
    shorter = schedule(max_steps=40, warmup_steps=10, cosine_min_lr_ratio=0.1)
    rates = [early.lr_at(step) for step in range(50)]
    assert rates[:40] == pytest.approx([shorter.lr_at(step) for step in range(40)])
    assert rates[40:] == pytest.approx([0.1] * 10)


def test_a_decay_longer_than_the_run_is_refused() -> None:
    options = {"num_decay_steps": 8}
    with pytest.raises(PlanError, match="5 steps of warmup and 8 of decay are more than the 12 steps"):
        schedule(max_steps=12, warmup_steps=5, lr_scheduler="warmup_stable_decay", lr_scheduler_kwargs=options)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (10, 0), (37, 5), (100, 100), (101, 33)])
def test_learning_rates_are_those_of_transformers(shape: str, total: int, warmup: int) -> None:
    ours = schedule(max_steps=total, warmup_steps=warmup, lr_scheduler=shape)
    assert [ours.lr_at(step) for step in range(total)] == pytest.approx(
        reference_curve(shape, total, warmup), abs=1e-12
    )


def test_cosine_ends_at_its_floor_and_starts_at_the_peak() -> None:
    with_floor = schedule(max_steps=50, warmup_steps=10, cosine_min_lr_ratio=0.1, learning_rate=2e-4)
    rates = [with_floor.lr_at(step) for step in range(10, 51)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[-1] == pytest.approx(2e-5)
    assert rates == sorted(rates, reverse=True)
    without = replace(with_floor, min_lr_ratio=0.0)
    for step in range(10, 51):
        assert with_floor.lr_at(step) == pytest.approx(2e-5 + 0.9 * without.lr_at(step))
    assert with_floor.lr_at(5) == without.lr_at(5) == pytest.approx(1e-4)


# --- events ---


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [(1, 4, [1, 2, 3, 4]), (3, 10, [1, 3, 6, 9, 10]), (50, 7, [1, 7]), (5, 5, [1, 5]), (2, 1, [1])],
)
def test_the_first_and_last_step_are_always_logged(every: int, total: int, steps: list[int]) -> None:
    assert when(schedule(max_steps=total, logging_steps=every).logs_at, total) == steps


DUE_CASES = [
    # (steps, of an epoch's 10; every; per epoch; when)
    (25, None, None, [10, 20, 25]),
    (25, 10, None, [10, 20, 25]),
    (25, 7, None, [7, 14, 21, 25]),
    (25, 99, None, [25]),
    (20, None, 2, [5, 10, 15, 20]),
    (20, None, 3, [4, 7, 10, 14, 17, 20]),
    (12, None, 10, list(range(1, 13))),
    (12, None, 100, list(range(1, 13))),
    (1, None, None, [1]),
]


@pytest.mark.parametrize(("total", "every", "per_epoch", "steps"), DUE_CASES)
def test_evaluations_and_saves_are_due_evenly_and_after_the_last_step(
    total: int, every: int | None, per_epoch: int | None, steps: list[int]
) -> None:
    evaluating = schedule(max_steps=total, eval_steps=every, evals_per_epoch=per_epoch)
    saving = schedule(max_steps=total, save_steps=every, saves_per_epoch=per_epoch)
    assert when(evaluating.evaluates_at, total) == steps
    assert when(saving.saves_at, total) == steps
    default = [done for done in range(1, total + 1) if done % 10 == 0 or done == total]
    assert when(evaluating.saves_at, total) == when(saving.evaluates_at, total) == default


@many
@given(rows=st.integers(1, 200), batch=st.integers(1, 70), times=st.integers(1, 30), epochs=st.integers(1, 3))
def test_n_times_an_epoch_is_n_times_each_epoch(rows: int, batch: int, times: int, epochs: int) -> None:
    of = schedule(rows, batch, num_epochs=float(epochs), saves_per_epoch=times)
    saves = when(of.saves_at, of.total_steps)
    assert len(saves) == epochs * min(times, of.steps_per_epoch)
    assert {epoch * of.steps_per_epoch for epoch in range(1, epochs + 1)} <= set(saves)


# --- which rows ---


@many
@given(rows=st.integers(1, 300), batch=st.integers(1, 100), epochs=st.integers(1, 3))
def test_every_epoch_covers_each_position_exactly_once(rows: int, batch: int, epochs: int) -> None:
    of = schedule(rows, batch, num_epochs=float(epochs))
    seen: list[tuple[int, int]] = []
    for step in range(of.total_steps):
        epoch, start, stop = of.rows_at(step)
        assert 0 < stop - start <= batch
        assert of.rows_seen(step) == len(seen)
        assert of.epoch_at(step) == pytest.approx(len(seen) / rows)
        seen += [(epoch, position) for position in range(start, stop)]
    assert seen == [(epoch, position) for epoch in range(epochs) for position in range(rows)]
    assert of.epoch_at(of.total_steps) == epochs
    assert of.rows_seen(of.total_steps) == epochs * rows


def test_max_steps_goes_on_into_further_epochs() -> None:
    of = schedule(7, 3, max_steps=8)
    assert [of.rows_at(step) for step in range(8)] == [
        (0, 0, 3), (0, 3, 6), (0, 6, 7),
        (1, 0, 3), (1, 3, 6), (1, 6, 7),
        (2, 0, 3), (2, 3, 6),
    ]  # fmt: skip
    assert [of.rows_seen(done) for done in range(9)] == [0, 3, 6, 7, 10, 13, 14, 17, 20]
    assert [round(of.epoch_at(done), 3) for done in (0, 1, 3, 4, 8)] == [0, 0.429, 1, 1.429, 2.857]


@many
@given(rows=st.integers(1, 300), batch=st.integers(1, 100), hundredths=st.integers(1, 350))
def test_a_fraction_of_epochs_is_that_fraction_of_steps_rounded_up(rows: int, batch: int, hundredths: int) -> None:
    of = schedule(rows, batch, num_epochs=hundredths / 100)
    assert of.total_steps == max(1, -(-hundredths * math.ceil(rows / batch) // 100))


# --- the world's pure parts ---

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


def test_more_ranks_than_gpus_are_refused_with_both_numbers():
    with pytest.raises(PlanError, match=r"4 ranks were started .* 2 GPU\(s\)(.|\n)*--num_processes 2"):
        require_a_gpu_for_each(4, 2)
    require_a_gpu_for_each(2, 2)


@pytest.mark.parametrize(
    ("env", "ranks", "cores", "threads"),
    [
        ({}, 1, 8, 8),
        ({}, 2, 8, 4),
        ({}, 3, 8, 2),
        ({}, 16, 8, 1),
        ({"OMP_NUM_THREADS": "3"}, 2, 8, 3),
        ({"OMP_NUM_THREADS": "1"}, 2, 8, 1),
        ({"OMP_NUM_THREADS": "0"}, 2, 8, 4),
        ({"OMP_NUM_THREADS": ""}, 2, 8, 4),
        ({"OMP_NUM_THREADS": "many"}, 2, 8, 4),
        ({"OMP_NUM_THREADS": "1", **LAUNCHED}, 2, 8, 4),  # the launcher's word, not the user's
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 2, 8, 4),
        ({"OMP_NUM_THREADS": "2", **LAUNCHED}, 2, 8, 2),
    ],
)
def test_threads_of_a_rank(env: dict[str, str], ranks: int, cores: int, threads: int) -> None:
    assert threads_for_a_rank(env, ranks, cores) == threads


@pytest.mark.parametrize(
    ("env", "lost"),
    [
        ({}, False),
        (LAUNCHED, False),
        ({"MASTER_PORT": "29500"}, False),
        ({**LAUNCHED, "MASTER_PORT": "29500"}, True),
        ({**LAUNCHED, "MASTER_PORT": "29500", "RANK": "0"}, False),
        ({**LAUNCHED, "MASTER_PORT": "29500", "OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "RANK": "1"}, False),
    ],
)
def test_a_launch_that_lost_its_ranks_is_refused_with_what_to_type(env: dict[str, str], lost: bool) -> None:
    if not lost:
        refuse_a_launch_that_lost_its_ranks(env)
        return
    with pytest.raises(PlanError, match="torchrun --nproc_per_node 2 -m"):
        refuse_a_launch_that_lost_its_ranks(env)
