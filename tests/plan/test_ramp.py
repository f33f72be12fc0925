"""A run that begins with smaller steps: which rows they take, how ranks share them, and resuming among them."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.batches import all_ranks, make_plan, make_store, rows_of
from support.plans import many, when
from support.processes import exit_of, run_command
from support.results import largest_difference, unfinished, weights_of
from support.rows import alpaca_rows, texts, write_rows

from finetuner.data.batch_sampler import padding_share, step_batches
from finetuner.data.batches import FILLER_ROW, PADDED
from finetuner.data.shuffling import row_order
from finetuner.errors import CheckpointError, PlanError, RecipeError
from finetuner.plan.ramp import Ramp
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe import load_recipe
from finetuner.recipe.sections import BatchSection, EvaluationSection, OutputSection, ScheduleSection
from finetuner.training.metrics import read_metrics
from finetuner.world import World


def ramp(start: int, steps: int, global_batch: int) -> Ramp:
    section = BatchSection.model_validate({"rampup_batch_size": {"start": start, "steps": steps}})
    return Ramp.from_section(section, global_batch)


def schedule(num_rows: int, global_batch: int, of: Ramp, saves: int | None = None, **keys: Any) -> Schedule:
    return Schedule.from_sections(
        ScheduleSection(learning_rate=1.0, **keys), EvaluationSection(), OutputSection(saves_per_epoch=saves),
        num_rows=num_rows, global_batch=global_batch, ramp=of,
    )  # fmt: skip


def test_steps_grow_from_the_start_to_the_global_batch_in_the_first_epoch_alone() -> None:
    """2 + 6 k // 3 rows, then 8; 30 rows an epoch."""
    of = schedule(30, 8, ramp(2, 3, 8), num_epochs=2.0)
    assert [of.rows_at(step) for step in range(of.total_steps)] == [
        (0, 0, 2), (0, 2, 6), (0, 6, 12), (0, 12, 20), (0, 20, 28), (0, 28, 30),
        (1, 0, 8), (1, 8, 16), (1, 16, 24), (1, 24, 30),
    ]  # fmt: skip
    assert [of.rows_seen(done) for done in range(11)] == [0, 2, 6, 12, 20, 28, 30, 38, 46, 54, 60]
    assert [of.epoch_at(done) for done in (0, 3, 6, 10)] == [0, 0.4, 1, 2]
    assert when(of.saves_at, 10) == [6, 10], "at the end of each epoch"
    assert when(schedule(30, 8, ramp(2, 3, 8), 2, num_epochs=2.0).saves_at, 10) == [3, 6, 8, 10]
    assert schedule(30, 8, ramp(2, 3, 8), num_epochs=1.5).total_steps == 8


RAMPS = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 200))


@many
@given(sizes=RAMPS, epochs=st.integers(1, 3))
def test_with_a_ramp_too_every_epoch_covers_each_position_exactly_once(
    sizes: tuple[int, int, int, int], epochs: int
) -> None:
    start, more, steps, beyond = sizes
    whole = start + more
    grows = [start + (whole - start) * k // steps for k in range(steps)]
    rows = sum(grows) + beyond
    of = schedule(rows, whole, ramp(start, steps, whole), num_epochs=float(epochs))
    seen: list[tuple[int, int]] = []
    for step in range(of.total_steps):
        epoch, begin, stop = of.rows_at(step)
        assert stop - begin == grows[step] if step < steps else 0 < stop - begin <= whole
        assert of.rows_seen(step) == len(seen)
        assert of.epoch_at(step) == pytest.approx(len(seen) / rows)
        seen += [(epoch, position) for position in range(begin, stop)]
    assert seen == [(epoch, position) for epoch in range(epochs) for position in range(rows)]
    assert of.steps_of_first_epoch + (epochs - 1) * of.steps_per_epoch == of.total_steps


@pytest.fixture
def planned(write_recipe: Callable[..., Path]) -> Callable[..., tuple[Plan, Any]]:
    def plan(size: int = 1, **keys: object) -> tuple[Plan, Any]:
        recipe = load_recipe(write_recipe(**{"rampup_batch_size": {"start": 3, "steps": 5}} | keys))
        return Plan.from_recipe(recipe, World(size=size)), recipe

    return plan


def test_a_budget_of_tokens_is_met_by_as_few_steps_as_can_be_and_a_stream_has_their_rows(planned, tmp_path) -> None:
    """Ramp: 3, 4, 5, 6, 7 rows = 25, then 8 in every step."""
    plan, recipe = planned(micro_batch_size=4, gradient_accumulation_steps=2, max_tokens=6000)
    of = plan.schedule(recipe, num_rows=1000, num_tokens=100_000)  # 60 rows of 100: 25 + 5 x 8 are enough
    assert of.total_steps == 10 and of.rows_seen(9) * 100 < 6000 <= of.rows_seen(10) * 100
    plan, recipe = planned(
        datasets=[texts(tmp_path, "a", 3)], streaming=True, micro_batch_size=8, max_steps=7,
        excess_length_strategy="truncate",
    )  # fmt: skip
    of = plan.schedule(recipe, 0)
    assert (of.num_rows, of.total_steps, of.steps_of_first_epoch) == (41, 7, 7)
    assert [plan.rows_before(step) for step in range(8)] == [0, 3, 7, 12, 18, 25, 33, 41]


def test_what_a_ramp_cannot_be_is_said_with_what_to_write(planned, write_recipe) -> None:
    split = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    small = {"rampup_batch_size": {"start": 16, "steps": 2}}
    with pytest.raises(PlanError, match=r"starts with 16 rows, .* global batch of 16\.(.|\n)*Write a smaller start"):
        planned(size=2, **split, **small)
    planned(size=3, **split, **small)
    plan, recipe = planned(**split)
    with pytest.raises(PlanError, match=r"take 25 rows, but an epoch has 24\.\nWrite `steps: 4` in it at most"):
        plan.schedule(recipe, num_rows=24)
    plan.schedule(recipe, num_rows=25)
    assert ramp(3, 4, 8).begins[-1] <= 24
    with pytest.raises(PlanError, match=r"an epoch has 2\.\nRemove it"):
        ramp(3, 1, 8).require_rows(2, 8)
    plan, recipe = planned(**split, num_epochs=0.1)
    with pytest.raises(PlanError, match=r"the batch grows for 5 steps, but the run has 4\.\nWrite `steps: 1`"):
        plan.schedule(recipe, num_rows=100)
    with pytest.raises(RecipeError, match=r"grows for 5 steps, but max_steps is 4\. Write `steps: 4` at most"):
        planned(max_steps=4)
    with pytest.raises(RecipeError, match="group_by_length cuts the rows into steps of one size"):
        planned(group_by_length=True)
    with pytest.raises(RecipeError, match="rampup_batch_size is a list, but must be a block"):
        planned(rampup_batch_size=[32, 32, 1000])


def test_the_plan_says_how_the_batch_begins_and_counts_its_tokens(capsys, write_recipe) -> None:
    recipe = write_recipe(
        base_model="from-scratch", model={"preset": "gpt-nano", "context": 64}, tokenizer="byte", sequence_len=64,
        micro_batch_size=8, max_steps=7, rampup_batch_size={"start": 3, "steps": 5},
    )  # fmt: skip
    assert exit_of("plan", recipe) == 0
    page = capsys.readouterr().out
    assert "3 rows, rising over 5 steps to 8 rows = 1 rank x 8 micro-batch x 1 accumulation" in page
    assert f"{41 * 64:,} in 7 steps" in page
    assert exit_of("plan", recipe, "max_steps=null", f"max_tokens={41 * 64 + 1}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 8
    assert exit_of("plan", recipe, "max_steps=null", "max_tokens=100") == 2
    assert "the batch grows for 5 steps, but the run has" in capsys.readouterr().err


SPLITS = [(1, 1, 12), (1, 4, 3), (1, 12, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3), (12, 1, 1)]


@pytest.mark.parametrize(("ranks", "micro", "accum"), SPLITS)
def test_the_rows_of_a_short_step_do_not_depend_on_the_split_and_fill_few_micro_batches(
    ranks: int, micro: int, accum: int
) -> None:
    store, plan = make_store(60), replace(make_plan(ranks, micro, accum), ramp=ramp(1, 6, 12))
    of, tokens, places = schedule(60, 12, plan.ramp), 0, 0
    for step in range(of.total_steps):
        _, start, stop = of.rows_at(step)
        by_rank = [step_batches(store, mine, of, step) for mine in all_ranks(plan)]
        batches = [batch for of_rank in by_rank for batch in of_rank]
        rows = Counter(row for batch in batches for row in rows_of(batch) if row != FILLER_ROW)
        assert rows == Counter(int(row) for row in row_order(plan.seed, 0, 60)[start:stop])
        filled = [any(rows_of(of_rank[k]) != [FILLER_ROW] for of_rank in by_rank) for k in range(accum)]
        assert filled == [k * ranks * micro < stop - start for k in range(accum)]
        computed = sum(batch.input_ids.numel() for batch in batches)
        longest = max(map(store.length, rows))
        assert computed <= (stop - start) * longest + 2 * ranks * accum, "what stands in for rows is two tokens"
        for batch in batches:
            if rows_of(batch) != [FILLER_ROW]:
                tokens, places = tokens + batch.num_tokens, places + batch.input_ids.numel()
    assert padding_share(store, plan, of, PADDED) == pytest.approx(1 - tokens / places)


RAMPED = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "rampup_batch_size": {"start": 1, "steps": 4}}
COMPARED = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "total_tokens")


@pytest.mark.slow
def test_a_run_resumed_while_its_batch_grows_is_bitwise_the_unbroken_run(write_recipe, train, tmp_path, capsys):
    """1, 2, 3 and 4 rows, then 6: 20 rows are 6 steps, and 4 in the second epoch. Another split stays on the curve."""
    recipe = write_recipe(num_epochs=2, save_steps=1, save_total_limit=20, learning_rate=2e-4, **RAMPED)
    unbroken = train(recipe)
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert "global batch 1 rows, rising over 4 steps to 6 rows = 1 rank x 2 micro-batch x 3 accumulation" in said
    assert "steps 10 = 2 epochs of 6, from the second on 4" in said
    assert [round(row["epoch"] * 20) for row in unbroken] == [1, 3, 6, 10, 16, 20, 26, 32, 38, 40]
    assert unbroken[5]["total_tokens"] * 2 == unbroken[9]["total_tokens"]
    out = unfinished(tmp_path / "out", tmp_path / "resumed", 2)
    resumed = train(recipe, f"output_dir={out}", "resume_from_checkpoint=true")
    assert [{k: r[k] for k in COMPARED} for r in resumed] == [{k: r[k] for k in COMPARED} for r in unbroken]
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(out)) == 0.0

    whole = ("micro_batch_size=6", "gradient_accumulation_steps=1", f"output_dir={tmp_path / 'whole'}")
    assert [r["loss"] for r in train(recipe, *whole)] == pytest.approx([r["loss"] for r in unbroken], rel=1e-5)
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")) < 1e-6
    with pytest.raises(CheckpointError, match=r"rampup_batch_size: \{'start': 1, 'steps': 4\} -> \{'start': 2"):
        train(recipe, f"output_dir={out}", "resume_from_checkpoint=true", "rampup_batch_size.start=2")


@pytest.mark.slow
def test_a_stream_resumes_bitwise_in_a_ramp_and_two_ranks_follow_its_curve(write_recipe, train, tmp_path):
    """The short steps do not divide among the ranks."""
    recipe = write_recipe(
        datasets=[texts(tmp_path, "a", 30)], streaming=True, streaming_multipack_buffer_size=6, sequence_len=32,
        max_steps=6, save_steps=2, save_total_limit=0, learning_rate=2e-4, excess_length_strategy="truncate", **RAMPED,
    )  # fmt: skip
    one = train(recipe)
    assert [row["num_tokens"] for row in one] == [31 * rows for rows in (1, 2, 3, 4, 6, 6)]
    out = unfinished(tmp_path / "out", tmp_path / "resumed", 2)
    resumed = train(recipe, f"output_dir={out}", "resume_from_checkpoint=true")
    assert [{k: r[k] for k in COMPARED} for r in resumed] == [{k: r[k] for k in COMPARED} for r in one]
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(out)) == 0.0
    said = launched(recipe, tmp_path / "copies")
    assert "DDP over 2 ranks" in said
    assert_same_curve(tmp_path, "copies", "out")


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_zero_follow_the_curve_of_one_over_a_ramp(stage, write_recipe, train, tmp_path):
    data = [{"path": str(write_rows(tmp_path / "31.jsonl", alpaca_rows(31))), "type": "alpaca"}]
    recipe = write_recipe(datasets=data, max_steps=6, learning_rate=2e-4, **RAMPED)
    train(recipe, f"output_dir={tmp_path / 'one'}")
    said = launched(recipe, tmp_path / "zero", f"deepspeed={{zero_optimization: {{stage: {stage}}}}}")
    assert f"ZeRO-{stage} over 2 ranks" in said
    assert_same_curve(tmp_path, "zero", "one")


def launched(recipe: Path, out: Path, *words: str) -> str:
    done = run_command("finetuner.train", recipe, f"output_dir={out}", "micro_batch_size=1", *words, ranks=2)
    assert done.code == 0, done.text
    return done.out


def assert_same_curve(folder: Path, name: str, reference: str) -> None:
    rows, expected = (read_metrics(folder / run / "metrics.jsonl") for run in (name, reference))
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in expected]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-5)
    assert largest_difference(weights_of(folder / name), weights_of(folder / reference)) < 1e-6
