"""The GPT of ours is the model it says it is: against transformers' own, against the formulas, and in every engine."""

import math

import pytest
import torch
from peft import PeftModel
from support.gpt import GPT2, IDS, make
from transformers import AutoConfig, AutoModelForCausalLM

from finetuner.data.new_tokenizers import write_byte_tokenizer
from finetuner.errors import ModelError
from finetuner.models import gpt
from finetuner.models.activation_checkpointing import recompute_activations
from finetuner.models.document_isolation import require_isolation
from finetuner.models.gpt import GPTConfig, GPTForCausalLM, rotate_half
from finetuner.models.gpt_conversion import portable_config, portable_weights
from finetuner.objectives.logits import head_is_composable


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("choices", [{}, GPT2], ids=["llama", "gpt2"])
def test_the_same_weights_in_transformers_give_the_same_logits_and_gradients(choices, tied):
    ours = make(tie_word_embeddings=tied, **choices)
    theirs = AutoModelForCausalLM.from_config(portable_config(ours.config), attn_implementation="eager").eval()
    weights = portable_weights(ours.config, ours.state_dict())
    theirs.load_state_dict(weights)
    assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)

    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    if tied:
        gradients["lm_head.weight"] = gradients["model.embed_tokens.weight"]
    expected = dict(theirs.named_parameters())
    compared = portable_weights(ours.config, gradients)
    assert set(expected) <= set(compared)
    for name, parameter in expected.items():
        assert torch.allclose(compared[name], parameter.grad, atol=1e-5), name


def test_a_shape_that_no_other_tool_has_is_said():
    with pytest.raises(ModelError, match=r"norm layer, activation swiglu.* no counterpart"):
        portable_config(GPTConfig(norm="layer"))


@pytest.mark.parametrize("choices", [{}, GPT2, {"norm": "layer", "bias": False}], ids=["llama", "gpt2", "mixed"])
def test_attention_as_it_is_written_equals_sdpa(choices):
    plain, fused = make(attn_implementation="eager", **choices), make(attn_implementation="sdpa", **choices)
    mask = torch.ones_like(IDS)
    mask[0, 20:] = 0
    for arguments in ({}, {"attention_mask": mask}):
        one, other = (model(IDS, **arguments).logits for model in (plain, fused))
        assert torch.allclose(one[1:], other[1:], atol=1e-5)
        assert torch.allclose(one[0, :20], other[0, :20], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("choices", [{}, GPT2], ids=["llama", "gpt2"])
def test_documents_of_a_pack_are_apart_and_the_loss_head_can_be_composed(attention, choices):
    model = make(attn_implementation=attention, **choices)
    require_isolation(model)
    assert head_is_composable(model)


def test_a_rotation_by_a_quarter_turn():
    assert rotate_half(torch.tensor([1, 2, 3, 4])).tolist() == [-3, -4, 1, 2]


def test_attention_depends_on_how_far_tokens_are_apart_and_not_on_where_they_are():
    model = make()
    here, there = (model(IDS, position_ids=torch.arange(24)[None] + start).logits for start in (0, 13))
    assert torch.allclose(here, there, atol=1e-4)
    stretched = model(IDS, position_ids=torch.arange(24)[None] * 2, attention_mask=torch.ones_like(IDS)).logits
    assert not torch.allclose(here, stretched, atol=1e-2)


@pytest.mark.parametrize("choices", [{}, GPT2], ids=["llama", "gpt2"])
def test_generation_with_the_cache_equals_generation_without(choices):
    model = make(**choices)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, anew = (model.generate(IDS[:, :6], use_cache=cache, **arguments) for cache in (True, False))
    assert torch.equal(cached, anew)
    assert cached.shape == (3, 18)


def test_a_saved_model_is_read_back_bit_for_bit(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPTConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_recomputing_activations_leaves_the_gradient_as_it_is():
    model = make().train()
    found = []
    for recompute in (False, True):
        if recompute:
            recompute_activations(model)
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_weights_begin_small_and_what_adds_to_the_sum_smaller_by_depth():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=8,
                       num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    model = GPTForCausalLM(config)
    block = model.model.layers[3]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for adds in (block.self_attn.o_proj, block.mlp.down_proj):
        assert adds.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    ids = torch.randint(512, (4, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(512), abs=0.15)


def test_the_module_shows_its_parts(capsys):
    gpt.main()
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj.weight" in shown
    assert "ln(256) = 5.545" in shown


@pytest.mark.slow
def test_an_ordinary_recipe_trains_lora_on_a_shape_that_no_other_tool_has(write_recipe, train, tmp_path):
    folder = tmp_path / "mixed"
    write_byte_tokenizer(folder)
    torch.manual_seed(0)
    GPTForCausalLM(
        GPTConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, norm="layer", activation="gelu")
    ).save_pretrained(folder)  # fmt: skip
    keys = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "gradient_checkpointing": True}
    rows = train(write_recipe(base_model=str(folder), max_steps=12, learning_rate=0.02, micro_batch_size=8, **keys))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.15  # the head is random, and frozen
    base = GPTForCausalLM.from_pretrained(folder).eval()
    before = base(IDS).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert not torch.allclose(adapted(IDS).logits, before, atol=1e-2)
