"""Every kind of adapter: what it trains, that PEFT reads it, and that the merged model is the adapted one."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.results import weights_of
from support.tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from finetuner.commands.merge import merge
from finetuner.errors import ModelError, RecipeError
from finetuner.export.merge_writer import merge_adapter
from finetuner.models.adapter import adapter_tensors, add_lora
from finetuner.models.load import load_model
from finetuner.models.lora_targets import modules_to_save, target_modules
from finetuner.models.trainable import train_only, trainable_parameters
from finetuner.recipe import load
from finetuner.recipe.sections import AdapterSection

QUICK = {
    "adapter": "lora", "lora_r": 4, "lora_alpha": 16, "max_steps": 3, "learning_rate": 0.02, "lr_scheduler": "constant"
}  # fmt: skip


def fresh(folder):
    return load_model(str(folder), dtype=torch.float32, attention=("sdpa",))


def adapted(folder, **keys):
    return add_lora(fresh(folder), AdapterSection(adapter="lora", **keys), base_model="x", seed=1)


def save_gpt2(folder, tokenizer_folder, tied=True):
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512,
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=tied,
        )
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


KINDS = {
    "rslora": {"peft_use_rslora": True},
    "dora": {"peft_use_dora": True},
    "gaussian": {"peft_init_lora_weights": "gaussian"},
    "one block": {"peft_layers_to_transform": [1]},
    "expression": {"lora_target_modules": r"model\.layers\.0\..*(up|down)_proj"},
    "whole head and embedding": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "whole embedding and new tokens": {"lora_modules_to_save": ["embed_tokens"], "tokens": ["<tool>"]},
    "whole norm": {"lora_modules_to_save": ["norm"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_equals_adapter_model(kind, tied, write_recipe, train, tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, tied=tied)
    recipe = write_recipe(base_model=str(base), **QUICK, **KINDS[kind])
    train(recipe)
    merge(str(recipe), [])
    out = tmp_path / "out"
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    model = AutoModelForCausalLM.from_pretrained(base)
    vocab = merged.config.vocab_size
    assert vocab == 512 + len(KINDS[kind].get("tokens", ())) and merged.config.tie_word_embeddings == tied
    ids = torch.arange(vocab - 20, vocab)[None]
    if vocab > 512:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    before = model(input_ids=ids).logits.detach()
    with_adapter = PeftModel.from_pretrained(model, str(out)).eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, with_adapter(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert (merged(input_ids=ids).logits - before).abs().max() > 1e-3, "training changed something"
    tensors = load_file(out / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in tensors) == (kind == "dora")


@pytest.mark.parametrize("kind", ["plain", "dora", "whole", "one block"])
def test_layers_that_store_their_weights_the_other_way_round_merge_right(
    kind, write_recipe, train, tmp_path, tokenizer_folder
):
    """GPT-2 stores (in, out), and its head is tied."""
    base = save_gpt2(tmp_path / "gpt2", tokenizer_folder)
    keys = {
        "plain": {},
        "dora": {"peft_use_dora": True, "lora_fan_in_fan_out": True},
        "whole": {"lora_modules_to_save": ["ln_f"]},
        "one block": {"peft_layers_to_transform": 1, "peft_layers_pattern": "h"},
    }[kind]
    recipe = write_recipe(base_model=str(base), **QUICK, **keys)
    train(recipe)
    out = tmp_path / "out"
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(out, str(base), out / "merged").folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"peft_use_dora": True, "peft_use_rslora": True},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"], "lora_dropout": 0.1},
    ],
    ids=["dora", "whole modules"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resumed_run_is_bitwise_the_unbroken_run(keys, tied, write_recipe, train, tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, tied=tied)
    recipe = write_recipe(base_model=str(base), save_steps=2, save_total_limit=0, **QUICK | {"max_steps": 4} | keys)
    train(recipe)
    unbroken = weights_of(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000002"
    train(recipe, f"resume_from_checkpoint={checkpoint}")
    resumed = weights_of(tmp_path / "out")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_each_kind_trains_what_it_says(tiny_model):
    def trained(**keys):
        return set(trainable_parameters(adapted(tiny_model, **keys)))

    assert {name.split(".")[4] for name in trained(peft_layers_to_transform=(1,))} == {"1"}
    assert {name.split(".")[4] for name in trained(peft_layers_to_transform=0, peft_layers_pattern="layers")} == {"0"}
    whole = {name for name in trained(lora_modules_to_save=("norm",)) if "lora_" not in name}
    assert whole == {"base_model.model.model.norm.modules_to_save.default.weight"}, "not the norms of the blocks"
    assert {n.split(".")[-4] for n in trained(lora_target_modules=r".*layers\.1.*q_proj")} == {"q_proj"}
    assert trained(lora_target_modules="all-linear") == trained(lora_target_modules=("all-linear",)) == trained()
    scaled = adapted(tiny_model, lora_r=4, lora_alpha=8, peft_use_rslora=True)
    assert scaled.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling["default"] == 8 / 4**0.5
    wide = adapter_tensors(adapted(tiny_model, lora_r=2, peft_init_lora_weights="gaussian"))
    spread = torch.cat([t.flatten() for name, t in wide.items() if "lora_A" in name]).std().item()
    assert spread == pytest.approx(1 / 2, rel=0.1)


def test_names_that_match_nothing_are_errors_that_list_what_there_is(
    tiny_model, tied_model, tmp_path, tokenizer_folder
):
    model = fresh(tiny_model)
    with pytest.raises(ModelError, match="Did you mean 'lm_head'"):
        modules_to_save(model, ("lm_haed",))
    with pytest.raises(ModelError, match="no linear layer does"):
        target_modules(model, "q_proj")
    with pytest.raises(ModelError, match="is not a linear layer"):
        target_modules(model, r".*layers\.0.*")
    with pytest.raises(ModelError, match="tied to the embedding"):
        target_modules(fresh(tied_model), ".*(q_proj|lm_head)")
    with pytest.raises(ModelError, match=r"names block 7, but the layers to adapt are in blocks 0 to 1"):
        adapted(tiny_model, peft_layers_to_transform=(0, 7))
    with pytest.raises(ModelError, match="under peft_layers_pattern blocks are in blocks none"):
        adapted(tiny_model, peft_layers_to_transform=0, peft_layers_pattern=("blocks",))
    with pytest.raises(ModelError, match=r"it must be false. Remove the key"):
        adapted(tiny_model, lora_fan_in_fan_out=True)
    with pytest.raises(ModelError, match="only where that is called embed_tokens"):
        adapted(save_gpt2(tmp_path / "t", tokenizer_folder), lora_modules_to_save=("wte",))
    with pytest.raises(ModelError, match="in both orders"):
        adapted(save_gpt2(tmp_path / "g", tokenizer_folder, tied=False), lora_target_modules=".*(c_attn)|lm_head")


def test_mistakes_about_adapters_are_found_in_the_recipe(write_recipe):
    for keys, message in (
        ({"lora_target_modules": "(", "adapter": "lora"}, "is not a regular expression"),
        ({"unfrozen_parameters": ["["]}, "is not a regular expression"),
        ({"unfrozen_parameters": ["model"], "adapter": "lora"}, "an adapter leaves all of it frozen"),
        ({"unfrozen_parameters": []}, "nothing would be trained"),
        ({"peft_layers_pattern": "layers", "adapter": "lora"}, "has no effect without peft_layers_to_transform"),
        ({"peft_layers_to_transform": [], "adapter": "lora"}, "no block is numbered"),
        ({"peft_layers_to_transform": 1, "lora_target_modules": ".*q", "adapter": "lora"}, "already says which blocks"),
        ({"peft_init_lora_weights": "pissa", "adapter": "lora"}, "this start of an adapter. Write true or gaussian"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(write_recipe(**keys))


@pytest.mark.slow
def test_a_run_goes_on_from_another_runs_adapter(write_recipe, train, tmp_path):
    recipe = write_recipe(**QUICK)
    first = train(recipe, f"output_dir={tmp_path / 'first'}")
    go_on = f"lora_model_dir={tmp_path / 'first'}"
    second = train(recipe, f"output_dir={tmp_path / 'second'}", go_on)
    assert second[0]["loss"] != first[0]["loss"], "the first step sees the adapter"
    still = train(recipe, f"output_dir={tmp_path / 'third'}", go_on, "learning_rate=1e-30")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "third")
    assert all(torch.equal(before[name], after[name]) for name in before) and still[0]["loss"] == second[0]["loss"]
    with pytest.raises(ModelError, match=r"lora_alpha: 16 there, 8 in the recipe"):
        train(recipe, f"output_dir={tmp_path / 'x'}", go_on, "lora_alpha=8")
    with pytest.raises(ModelError, match="is not the folder of an adapter"):
        train(recipe, f"output_dir={tmp_path / 'y'}", f"lora_model_dir={tmp_path}")


def test_only_the_unfrozen_parameters_move(write_recipe, train, tmp_path, tiny_model):
    patterns = [r"model\.layers\.1\.", "lm_head"]
    train(write_recipe(unfrozen_parameters=patterns, max_steps=2, lr_scheduler="constant"))
    before, after = load_file(tiny_model / "model.safetensors"), weights_of(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("model.layers.1.", "lm_head")) for name in moved)
    assert {name for name in before if name.startswith(("model.layers.1.", "lm_head"))} == moved
    with pytest.raises(ModelError, match="no parameter's name begins like that"):
        train_only(fresh(tiny_model), ("layers.1",))


def test_an_adapter_that_peft_saved_with_both_halves_of_a_tied_pair_merges(tied_model, tmp_path):
    model = adapted(tied_model, lora_modules_to_save=("lm_head",))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("lm_head" in name or "embed_tokens" in name for name in tensors) == 2
    merged = AutoModelForCausalLM.from_pretrained(
        merge_adapter(tmp_path / "adapter", str(tied_model), tmp_path / "merged").folder
    )
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    head = next(name for name in tensors if "lm_head" in name)
    save_file(tensors | {head: tensors[head] + 1}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="tied to the embedding"):
        merge_adapter(tmp_path / "adapter", str(tied_model), tmp_path / "other")
