"""Losses that weigh each token: by the formulas of LLaMA-Factory and Axolotl, exact however a batch is split."""

from pathlib import Path

import pytest
import torch
import yaml
from support.results import largest_difference, weights_of
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from finetuner.errors import RecipeError
from finetuner.objectives import logits as loss_module
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken, Regularization, Weighting, summed_loss
from finetuner.recipe import load
from finetuner.recipe.convert import convert

IDS = torch.arange(24).reshape(2, 12)
POSITIONS, TARGETS = torch.arange(20), torch.arange(100, 120)
BATCH = {
    "input_ids": IDS, "attention_mask": torch.ones_like(IDS), "positions": POSITIONS, "targets": TARGETS,
    "position_ids": None,
}  # fmt: skip
DFT = Weighting("probability")


def dft(logits: torch.Tensor) -> torch.Tensor:
    """LLaMA-Factory 0.9.5, dft_loss_func: -p log p, p without gradient."""
    p = torch.softmax(logits, dim=-1)[torch.arange(len(TARGETS)), TARGETS]
    return -(p.detach() * p.log()).sum()


def eaft(logits: torch.Tensor, *, alpha: float, k: int, unit: float) -> torch.Tensor:
    """LLaMA-Factory 0.9.5 (unit 3, k 20), and Axolotl 0.19.0, eaft_loss (unit 1)."""
    top = torch.softmax(logits.detach().sort(dim=-1, descending=True).values[:, :k], dim=-1)
    weights = (-(top * top.log()).sum(-1) / unit) ** alpha
    return (weights * F.cross_entropy(logits, TARGETS, reduction="none")).sum()


@pytest.mark.parametrize("way", ["composed", "in chunks", "by the model's own head"])
@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        (DFT, dft),
        (Weighting("entropy", 1.5), lambda logits: eaft(logits, alpha=1.5, k=20, unit=3.0)),
        (Weighting("entropy", 1.0, 7, 1.0), lambda logits: eaft(logits, alpha=1.0, k=7, unit=1.0)),
    ],
    ids=["DFT", "EAFT of LLaMA-Factory", "EAFT of Axolotl"],
)
def test_the_weighted_loss_is_its_formula_in_value_and_gradient(way, weighting, formula, tiny_model, monkeypatch):
    if way == "in chunks":
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 512 * 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # logits that differ, so that weights do
    objective = NextToken(Regularization(weighting=weighting))
    loss = LossModule(model, objective, composed=way != "by the model's own head")(BATCH)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = formula(model(IDS).logits.flatten(0, 1)[POSITIONS].float())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(gradients, {name: p.grad for name, p in model.named_parameters()}) < 1e-4


def test_a_sure_token_and_one_without_a_chance_give_no_nan():
    logits = torch.tensor([[200.0, -200.0, 0.0], [200.0, -200.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 1])
    for weighting in (DFT, Weighting("entropy", 0.5)):
        loss = summed_loss(logits, targets, Regularization(weighting=weighting))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_evaluation_is_without_weights(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    weighted = LossModule(model, NextToken(Regularization(weighting=DFT)), composed=True).eval()
    assert torch.equal(weighted(BATCH), LossModule(model, NextToken(), composed=True)(BATCH))


def test_a_weighted_run_is_the_same_however_its_batch_is_split(write_recipe, train, tmp_path):
    recipe = write_recipe(loss_weighting="probability", max_steps=2, micro_batch_size=4)
    whole = train(recipe, f"output_dir={tmp_path / 'a'}")
    split = train(recipe, f"output_dir={tmp_path / 'b'}", "micro_batch_size=1", "gradient_accumulation_steps=4")
    plain = train(recipe, f"output_dir={tmp_path / 'c'}", "loss_weighting=")
    assert [row["loss"] for row in split] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-4
    assert whole[0]["loss"] < 0.5 * plain[0]["loss"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"loss_weighting": "probability", "label_smoothing_factor": 0.1}, "Remove one"),
        ({"loss_weighting_exponent": 2.0}, "no effect without loss_weighting"),
        ({"loss_weighting": "probability", "loss_weighting_top_k": 5}, "no effect without `loss_weighting: entropy`"),
    ],
)
def test_a_part_of_the_weighting_without_effect_is_refused(write_recipe, keys, said):
    with pytest.raises(RecipeError, match=said):
        load(write_recipe(**keys))


def llama_factory(tmp_path: Path, **keys: object) -> Path:
    lines = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "finetuning_type": "full", "dataset": "d",
             "template": "qwen", "output_dir": "out", **keys}  # fmt: skip
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}')
    (tmp_path / "data" / "d.json").write_text('[{"instruction": "a", "output": "b"}]')
    lines["dataset_dir"] = str(tmp_path / "data")
    path = tmp_path / "lf.yml"
    path.write_text(yaml.safe_dump(lines))
    return path


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"use_dft_loss": True}, ("probability", 1.0, 20, 3.0)),
        ({"use_eaft_loss": True, "eaft_alpha": 1.5}, ("entropy", 1.5, 20, 3.0)),
        ({"use_eaft_loss": True}, ("entropy", 1.0, 20, 3.0)),
        ({"eaft_alpha": 1.5}, (None, 1.0, 20, 3.0)),
        ({"stage": "pt", "use_dft_loss": True}, (None, 1.0, 20, 3.0)),
    ],
)
def test_the_switches_of_llama_factory_are_converted(tmp_path, keys, expected):
    converted = tmp_path / "ours.yml"
    converted.write_text(convert(llama_factory(tmp_path, **keys)).text)
    section = load(converted, check_files=False).recipe.regularization
    assert (
        section.loss_weighting, section.loss_weighting_exponent, section.loss_weighting_top_k,
        section.loss_weighting_entropy_unit,
    ) == expected  # fmt: skip


def test_two_losses_of_llama_factory_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="use_dft_loss and use_eaft_loss"):
        convert(llama_factory(tmp_path, use_dft_loss=True, use_eaft_loss=True))


def test_the_switch_of_axolotl_weighs_in_nats(write_recipe):
    section = load(write_recipe(use_eaft=True, eaft_alpha=2.0, eaft_k=10)).recipe.regularization
    assert (section.loss_weighting, section.loss_weighting_exponent) == ("entropy", 2.0)
    assert (section.loss_weighting_top_k, section.loss_weighting_entropy_unit) == (10, 1.0)
    assert load(write_recipe(use_eaft=False)).recipe.regularization.loss_weighting is None
