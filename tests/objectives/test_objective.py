"""The contract of an objective: sums and counts, whatever their number, give one gradient for every split."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from support.batches import make_plan, make_schedule, make_store
from transformers import AutoModelForCausalLM

from finetuner.data.batch_sampler import step_batches
from finetuner.data.batches import BatchLayout
from finetuner.objectives import OBJECTIVES, build_objective
from finetuner.objectives.base import Figure, Term, figure_means, gradient_scales, step_loss
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.parallel.replicated import ReplicatedEngine
from finetuner.recipe import load_recipe
from finetuner.training.evaluation import HeldOut
from finetuner.training.guards import Guards
from finetuner.training.loop import Run, train_step


@dataclass(frozen=True)
class LikelihoodAndEntropy:
    """K = 2 with counts that differ: the likelihood over trained tokens, and 0.1 x the entropy over rows. F = 1."""

    terms: ClassVar[tuple[Term, ...]] = (Term("likelihood", "trained tokens"), Term("entropy", "rows", weight=0.1))
    figures: ClassVar[tuple[Figure, ...]] = (Figure("top_probability", term=0),)
    text_term: ClassVar[int | None] = 0

    def counts(self, batch):
        return (batch.num_trained, len(batch.input_ids))

    def sums(self, module, batch):
        def of_chunk(logits, where):
            log_p = logits.log_softmax(-1)
            nll = -log_p.gather(1, batch["targets"][where].unsqueeze(1)).sum()
            entropy = -(log_p.exp() * log_p).sum()
            return torch.stack([nll, entropy, log_p.detach().exp().amax(-1).sum()])

        return module.sum_over_logits(batch, of_chunk)


def step_of(objective, model_folder, micro: int, accum: int):
    """Loss, figures and gradient of one step of 8 rows in `accum` micro-batches of `micro` rows."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accum)
    loss = LossModule(AutoModelForCausalLM.from_pretrained(model_folder), objective, composed=True)
    plan, rows = make_plan(micro=micro, accum=accum), make_store(8)
    engine = ReplicatedEngine(accelerator, loss, lambda: torch.optim.SGD(loss.parameters(), lr=1.0))
    schedule = replace(make_schedule(8, plan), peak_lr=1.0)
    run = Run(accelerator, engine, objective, plan, schedule, Guards(), HeldOut(rows, BatchLayout()), max_grad_norm=0.0)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    stats = train_step(run, step_batches(rows, plan, schedule, 0, BatchLayout()), 0)
    gradient = {name: before[name] - p.detach() for name, p in loss.named_parameters()}
    return stats, gradient


@pytest.mark.parametrize("objective", [NextToken(), LikelihoodAndEntropy()], ids=["one term", "two terms"])
def test_three_splits_of_a_batch_give_one_loss_and_one_gradient(objective, tiny_model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (stats, gradient), *others = (step_of(objective, tiny_model, *split) for split in ((8, 1), (2, 4), (1, 8)))
    assert math.isfinite(stats.loss) and stats.grad_norm > 0
    for other, its in others:
        assert other.loss == pytest.approx(stats.loss, rel=1e-6)
        assert other.grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)
        assert other.figures == pytest.approx(stats.figures, rel=1e-6)
        for name, expected in gradient.items():
            torch.testing.assert_close(its[name], expected, rtol=1e-4, atol=1e-6)
    assert set(stats.figures) == {figure.name for figure in objective.figures}


def test_the_loss_is_the_sum_of_weighted_means():
    objective = LikelihoodAndEntropy()
    assert step_loss(objective, [30.0, 8.0, 5.0], [10, 4]) == pytest.approx(30 / 10 + 0.1 * 8 / 4)
    assert figure_means(objective, [30.0, 8.0, 5.0], [10, 4]) == {"top_probability": 0.5}
    assert gradient_scales(objective, [10, 4], data_parallel=2) == [0.2, pytest.approx(0.05)]
    assert gradient_scales(objective, [10, 0], data_parallel=2)[1] == 0.0, "a term without a pair adds nothing"


def test_every_objective_of_the_table_is_built_from_a_recipe(write_recipe):
    recipe = load_recipe(write_recipe(label_smoothing_factor=0.1))
    for row in OBJECTIVES.values():
        objective = row.build(recipe)
        assert objective.terms and all(figure.term < len(objective.terms) for figure in objective.figures)
    assert build_objective(recipe).regularization.label_smoothing == 0.1
