"""Learning rates by Axolotl's names, against values of its schedulers.py (0.19.0) and of transformers."""

from typing import Any

import pytest
from support.rows import RecipeWriter

from finetuner.errors import RecipeError
from finetuner.plan.schedule import Schedule
from finetuner.recipe import load
from finetuner.recipe.sections import EvaluationSection, OutputSection, ScheduleSection

# (steps, warmup, lowest rate) -> the rates of RexLR(optimizer, 1.0, lowest, steps, warmup), recorded from that file
REX = [
    (8, 0, 0.0, [0.985915493, 0.9677419355, 0.9433962264, 0.9090909091, 0.8571428571, 0.7692307692, 0.5882352941, 0]),
    (8, 3, 0.0, [1 / 3, 2 / 3, 1, 0.9756097561, 0.9375, 0.8695652174, 0.7142857143, 0]),
    (8, 3, 0.1, [1 / 3, 2 / 3, 1, 0.9780487805, 0.94375, 0.8826086957, 0.7428571429, 0.1]),
    (5, 5, 0.2, [0.2, 0.4, 0.6, 0.8, 1]),
    (1, 0, 0.5, [0.5]),
]
# (steps, warmup) -> the rates of its get_cosine_schedule_with_quadratic_warmup
QUADRATIC = [
    (8, 0, [1, 0.9619397663, 0.8535533906, 0.6913417162, 0.5, 0.3086582838, 0.1464466094, 0.0380602337]),
    (8, 3, [0, 1 / 9, 4 / 9, 1, 0.9045084972, 0.6545084972, 0.3454915028, 0.0954915028]),
    (8, 8, [0, 0.015625, 0.0625, 0.140625, 0.25, 0.390625, 0.5625, 0.765625]),
]


def rates(steps: int, **keys: Any) -> list[float]:
    section = ScheduleSection(**{"learning_rate": 1.0, "max_steps": steps} | keys)
    schedule = Schedule.from_sections(section, EvaluationSection(), OutputSection(), num_rows=64, global_batch=4)
    return [schedule.lr_at(step) for step in range(steps)]


@pytest.mark.parametrize(("steps", "warmup", "lowest", "theirs"), REX)
def test_rex_has_axolotls_rates(steps: int, warmup: int, lowest: float, theirs: list[float]) -> None:
    ours = rates(steps, lr_scheduler="rex", warmup_steps=warmup, cosine_min_lr_ratio=lowest)
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(("steps", "warmup", "theirs"), QUADRATIC)
def test_a_quadratic_warmup_has_axolotls_rates(steps: int, warmup: int, theirs: list[float]) -> None:
    assert rates(steps, lr_quadratic_warmup=True, warmup_steps=warmup) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize(
    "options",
    [{"min_lr_rate": 0.1}, {"min_lr": 0.2, "num_cycles": 1.5}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.25}],
)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_cosine_warmup_with_min_lr_is_that_of_transformers(options: dict[str, Any], warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler("cosine_warmup_with_min_lr", optimizer, warmup, 23, scheduler_specific_kwargs=options)
    ours = rates(
        23,
        learning_rate=0.5,
        warmup_steps=warmup,
        lr_scheduler="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs=options,
    )
    for step in range(23):
        assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("key", ["cosine_min_lr", "eta_min"])
def test_a_lowest_rate_is_the_ratio_of_the_learning_rate(write_recipe: RecipeWriter, key: str) -> None:
    given = write_recipe(learning_rate=2e-5, **{key: 7e-7})
    section = load(given).recipe.schedule
    assert section.lowest_rate == 7e-7 / 2e-5
    as_ratio = section.model_copy(update={"cosine_min_lr": None, "cosine_min_lr_ratio": 7e-7 / 2e-5})

    def last(one: ScheduleSection) -> float:
        return Schedule.from_sections(one, EvaluationSection(), OutputSection(), num_rows=9, global_batch=1).lr_at(9)

    assert last(section) == last(as_ratio) == pytest.approx(7e-7)
    # an override of the learning rate leaves the rate at the end where it was written
    assert load(given, ("learning_rate=1e-4",)).recipe.schedule.lowest_rate == pytest.approx(7e-3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lr_quadratic_warmup": True, "lr_scheduler": "linear"}, "lr_quadratic_warmup has no effect"),
        ({"lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.1}, "Axolotl drops the lowest rate"),
        ({"lr_quadratic_warmup": True, "cosine_constant_lr_ratio": 0.8}, "Axolotl drops cosine_constant_lr_ratio"),
        ({"cosine_min_lr": 1e-5, "cosine_min_lr_ratio": 0.1}, "both say where the schedule ends"),
        ({"cosine_min_lr": 1e-2}, "above learning_rate"),
        ({"cosine_min_lr": 1e-5, "lr_scheduler": "linear"}, "cosine_min_lr has no effect"),
        ({"cosine_constant_lr_ratio": 0.5, "lr_scheduler": "rex"}, "cosine_constant_lr_ratio has no effect"),
        ({"lr_scheduler": "rex", "lr_scheduler_kwargs": {"gamma": 1}}, "rex has no option 'gamma'"),
        ({"lr_scheduler": "one_cycle"}, "moves Adam's beta1 too"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(write_recipe: RecipeWriter, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load(write_recipe(**keys))


def test_the_rate_that_a_run_logs_is_rex(write_recipe: RecipeWriter, train: Any) -> None:
    recipe = write_recipe(lr_scheduler="rex", max_steps=3, micro_batch_size=1, learning_rate=1e-3)
    logged = [row["learning_rate"] for row in train(recipe) if "learning_rate" in row]
    assert logged == pytest.approx([lr * 1e-3 for lr in rates(3, lr_scheduler="rex")])
