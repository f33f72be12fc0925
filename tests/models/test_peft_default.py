"""`lora_target_modules: peft-default` adapts the layers that PEFT itself would."""

import pytest
from support.tiny import make_model

from finetuner.errors import ModelError
from finetuner.models.lora_targets import choose_targets, default_targets
from finetuner.recipe.sections.adapter import AdapterSection


def test_the_layers_are_those_that_peft_adapts_when_none_are_named(tmp_path, tokenizer_folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "model", tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = choose_targets(model, AdapterSection(adapter="lora", lora_target_modules="peft-default"))
    assert targets.modules == ["q_proj", "v_proj"]
    of_peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    adapted = {name.rpartition(".lora_A")[0] for name, _ in of_peft.named_parameters() if ".lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}


def test_an_architecture_without_a_default_is_refused_with_the_names_of_its_layers(tmp_path, tokenizer_folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmo2", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="PEFT has no default layers for the architecture 'olmo2'") as caught:
        default_targets(model)
    assert "q_proj" in str(caught.value)
