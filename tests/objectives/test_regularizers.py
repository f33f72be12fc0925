"""What training adds to the loss: by formula, in value and gradient, and not in evaluation."""

import math

import pytest
import torch
from support.results import largest_difference, unfinished, weights_of
from torch import nn
from transformers import AutoModelForCausalLM

from finetuner.models.neftune import document_lengths, embedding_noise
from finetuner.objectives import logits as loss_module
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken, Regularization, summed_loss

IDS = torch.arange(24).reshape(2, 12)
POSITIONS, TARGETS = torch.arange(20), torch.arange(100, 120)
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "positions": POSITIONS,
    "targets": TARGETS,
    "position_ids": None,
}


def loss_of(model: nn.Module, added: Regularization, composed: bool = True) -> torch.Tensor:
    return LossModule(model, NextToken(added), composed=composed)(BATCH)


@pytest.mark.parametrize("way", ["composed", "in chunks", "by the model's own head"])
def test_smoothing_and_z_loss_are_their_formulas_in_value_and_gradient(way, tiny_model, monkeypatch):
    if way == "in chunks":
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 512 * 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    loss = loss_of(model, Regularization(label_smoothing=0.1, z_loss=1e-2), composed=way != "by the model's own head")
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(IDS).logits.flatten(0, 1)[POSITIONS]
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    smooth = 0.9 * -log_p[torch.arange(20), TARGETS] + 0.1 * -log_p.mean(-1)
    expected = (smooth + 1e-2 * logits.exp().sum(-1).log() ** 2).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_difference(gradients, {name: p.grad for name, p in model.named_parameters()}) < 1e-4


def test_evaluation_is_without_what_training_adds(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    added = LossModule(model, NextToken(Regularization(0.1, 1.0, 50.0)), composed=True).eval()
    assert torch.equal(added(BATCH), loss_of(model, Regularization()))
    logits = torch.randn(3, 7)
    assert summed_loss(logits, torch.tensor([0, 1, 2]), Regularization(z_loss=1.0)) > summed_loss(
        logits, torch.tensor([0, 1, 2]), Regularization()
    )


def test_noise_is_uniform_of_the_papers_size_by_document_and_gone_afterwards():
    embedding = nn.Embedding(10, 64)
    ids = torch.zeros(2, 100, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    with embedding_noise(embedding, 5.0, mask, None):
        noise = embedding(ids) - embedding.weight[0]
    for row, length in ((0, 100), (1, 25)):
        size = 5.0 / math.sqrt(length * 64)
        assert 0.99 * size < float(noise[row].detach().abs().max()) <= size * (1 + 1e-5)
        assert float(noise[row].detach().std()) == pytest.approx(size / math.sqrt(3), rel=0.05)
    assert torch.equal(embedding(ids), embedding.weight[0].expand(2, 100, 64))
    packed = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    assert document_lengths(None, packed).tolist() == [[3, 3, 3, 2, 2, 4, 4, 4, 4], [7] * 7 + [2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_run_with_noise_resumes_bitwise(packed, write_recipe, train, tmp_path):
    recipe = write_recipe(
        neftune_noise_alpha=5.0, label_smoothing_factor=0.1, max_steps=4, save_steps=2, micro_batch_size=2,
        sample_packing=packed, gradient_checkpointing=True,
    )  # fmt: skip
    rows = train(recipe, f"output_dir={tmp_path / 'a'}")
    again = train(recipe, f"output_dir={unfinished(tmp_path / 'a', tmp_path / 'b', 2)}", "resume_from_checkpoint=true")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    quiet = train(recipe, f"output_dir={tmp_path / 'c'}", "neftune_noise_alpha=")
    assert quiet[0]["loss"] != rows[0]["loss"]
    held = train(
        recipe, f"output_dir={tmp_path / 'd'}", "neftune_noise_alpha=", "z_loss_coefficient=0.1", "max_steps=1"
    )
    assert held[0]["grad_norm"] != quiet[0]["grad_norm"]
