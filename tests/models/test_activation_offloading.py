"""activation_offloading: the layers' inputs wait on the host, and no number is another for it."""

import copy
from typing import Any

import pytest
import torch
from support.documents import documents
from support.results import largest_difference, weights_of
from support.rows import RecipeWriter

from finetuner.data.batches import BatchTensors, collate
from finetuner.errors import RecipeError
from finetuner.models.activation_checkpointing import recompute_activations
from finetuner.models.activation_offloading import HostedActivations
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.recipe import load


def batch() -> BatchTensors:
    return collate(documents(), [0, 1, 2]).tensors()


def gradients(model: Any, *, offloaded: bool, recomputed: bool = True) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of one batch, and the bytes that went to the host."""
    model = copy.deepcopy(model).train()
    if recomputed:
        recompute_activations(model)
    activations = HostedActivations() if offloaded else None
    loss = LossModule(model, NextToken(), composed=True, activations=activations)
    loss(batch())[0].backward()
    moved = 0 if activations is None else activations.num_bytes
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, moved


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


def test_gradients_are_bitwise_those_of_activations_on_the_device(model: Any) -> None:
    here, none = gradients(model, offloaded=False)
    there, moved = gradients(model, offloaded=True)
    assert none == 0 and moved > 0
    assert here.keys() == there.keys() and len(here) == len(list(model.parameters()))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_what_goes_to_the_host_are_the_inputs_of_the_layers_and_little_else(model: Any) -> None:
    config, (rows, length) = model.config, batch()["input_ids"].shape
    one_state = rows * length * config.hidden_size * 4
    _, moved = gradients(model, offloaded=True)
    layers = config.num_hidden_layers
    # the final norm keeps a state or two as well, and the embedding its token ids
    assert layers * one_state <= moved <= (layers + 4) * one_state
    _, everything = gradients(model, offloaded=True, recomputed=False)
    assert everything > 5 * moved


def test_weights_stay_where_they_are() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    activations = HostedActivations()
    given = torch.ones(2, 4, requires_grad=True)
    with activations:
        out = torch.nn.functional.linear(given, weight) * 1.0
    assert activations.num_bytes == given.nbytes
    out.sum().backward()
    assert weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"adapter": "lora", "lora_dropout": 0.1}, {"bf16": True}])
def test_a_run_ends_with_the_weights_of_one_without_it(
    keys: dict[str, Any], write_recipe: RecipeWriter, train: Any, tmp_path: Any
) -> None:
    recipe = write_recipe(gradient_checkpointing=True, max_steps=2, micro_batch_size=2, **keys)
    here = train(recipe, f"output_dir={tmp_path / 'a'}")
    there = train(recipe, f"output_dir={tmp_path / 'b'}", "activation_offloading=true")
    assert [row["loss"] for row in here] == [row["loss"] for row in there]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0


def test_it_needs_layers_that_are_recomputed(write_recipe: RecipeWriter) -> None:
    with pytest.raises(RecipeError, match="Add `gradient_checkpointing: true`"):
        load(write_recipe(activation_offloading=True))
    load(write_recipe(activation_offloading=True, fsdp=["full_shard"], fsdp_config={"activation_checkpointing": True}))


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": "offload"},
        {"gradient_checkpointing": "unsloth"},
        {"gradient_checkpointing": True, "activation_offloading": "legacy"},
        {"gradient_checkpointing": True, "activation_offloading": "hidden_states"},
        {"gradient_checkpointing": True, "activation_offloading": True},
    ],
)
def test_axolotls_spellings_mean_both_keys(write_recipe: RecipeWriter, keys: dict[str, Any]) -> None:
    precision = load(write_recipe(**keys)).recipe.precision
    assert precision.gradient_checkpointing is True and precision.activation_offloading is True


@pytest.mark.parametrize("keys", [{"gradient_checkpointing": "offload_disk"}, {"activation_offloading": "disk"}])
def test_activations_on_disk_are_named(write_recipe: RecipeWriter, keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="activations on disk"):
        load(write_recipe(**keys))
