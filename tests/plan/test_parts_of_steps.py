"""eval_steps, save_steps and logging_steps below 1: a part of all steps, rounded up, as transformers has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import RecipeWriter

from finetuner.checkpoint.folder import checkpoint_folder
from finetuner.errors import RecipeError
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe import load
from finetuner.recipe.sections import EvaluationSection, OutputSection, ScheduleSection
from finetuner.world import World


def schedule(total: int, **keys: Any) -> Schedule:
    of_evaluation = {key: value for key, value in keys.items() if key.startswith("eval")}
    return Schedule.from_sections(
        ScheduleSection(learning_rate=1e-3, max_steps=total),
        EvaluationSection(**of_evaluation),
        OutputSection(**{key: value for key, value in keys.items() if key not in of_evaluation}),
        num_rows=1000,
        global_batch=4,
    )


@pytest.mark.parametrize("total", [1, 7, 20, 140, 999])
@pytest.mark.parametrize("part", [0.05, 0.1, 1 / 3, 0.5, 0.99])
def test_events_come_at_the_steps_of_transformers(part: float, total: int) -> None:
    from transformers import TrainingArguments
    from transformers.trainer_callback import TrainerState

    theirs = TrainerState()
    theirs.max_steps = total
    arguments = TrainingArguments(
        output_dir="unused", eval_strategy="steps", eval_steps=part, save_steps=part, logging_steps=part, use_cpu=True
    )
    theirs.compute_steps(arguments, total)
    ours = schedule(total, eval_steps=part, save_steps=part, logging_steps=part)
    assert (ours.eval_steps, ours.save_steps, ours.logging_steps) == (
        theirs.eval_steps,
        theirs.save_steps,
        theirs.logging_steps,
    )
    every = int(theirs.eval_steps)
    due = [done for done in range(1, total + 1) if done % every == 0 or done == total]
    assert [done for done in range(1, total + 1) if ours.evaluates_at(done)] == due
    assert [done for done in range(1, total + 1) if ours.saves_at(done)] == due


def test_whole_numbers_stay_steps() -> None:
    ours = schedule(100, eval_steps=1, save_steps=30.0, logging_steps=7)
    assert (ours.eval_steps, ours.save_steps, ours.logging_steps) == (1, 30, 7)
    assert all(isinstance(n, int) for n in (ours.eval_steps, ours.save_steps, ours.logging_steps))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "at least 1"),
        (-0.5, "a whole number"),
        (1.5, "a whole number of steps"),
        ("0.1", "a whole number or a number"),
    ],
)
def test_other_numbers_of_steps_are_refused(write_recipe: RecipeWriter, value: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load(write_recipe(logging_steps=value))


def test_a_part_of_all_steps_and_a_number_per_epoch_exclude_each_other(write_recipe: RecipeWriter) -> None:
    with pytest.raises(RecipeError, match="eval_steps and evals_per_epoch are both given"):
        load(write_recipe(eval_steps=0.1, evals_per_epoch=2, val_set_size=0.5))


def test_a_stream_saves_at_parts_of_max_steps(write_recipe: RecipeWriter) -> None:
    recipe = load(write_recipe(streaming=True, max_steps=30, save_steps=0.1, logging_steps=0.5)).recipe
    ours = Plan.from_recipe(recipe, World.detect()).schedule(recipe, num_rows=0)
    assert [done for done in range(1, 31) if ours.saves_at(done)] == list(range(3, 31, 3))
    assert [done for done in range(1, 31) if ours.logs_at(done)] == [1, 15, 30]


@pytest.mark.slow
def test_a_run_evaluates_saves_and_logs_at_parts_of_its_steps(
    write_recipe: RecipeWriter, train: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = train(
        write_recipe(
            num_epochs=2, micro_batch_size=2, val_set_size=4, eval_steps=0.25, save_steps=0.5, logging_steps=0.3
        )
    )
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12, 16]
    assert [row["step"] for row in rows if "loss" in row] == [1, 5, 10, 15, 16]
    saved = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert [checkpoint_folder(tmp_path / "out", step) for step in (8, 16)] == saved
