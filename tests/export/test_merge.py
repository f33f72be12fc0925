"""The merged model is base + adapter, streamed, and whole or absent."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.results import weights_of
from support.tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.commands.merge import merge
from finetuner.errors import ModelError, RecipeError
from finetuner.export import merge_writer
from finetuner.export.merge import merge as merge_trained
from finetuner.export.merge_options import MergeOptions
from finetuner.export.merge_writer import merge_adapter
from finetuner.models.load import load_model
from finetuner.models.quant_format import choose_quant_format
from finetuner.recipe import load
from finetuner.storage.safetensors_stream import read_header

FP4 = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 16,
    "max_steps": 3,
    "learning_rate": 0.02,
    "lr_scheduler": "constant",
}


def greedy(model, tokenizer, text: str) -> list[int]:
    """New tokens are left out: their rows were drawn alike, and two equal logits are no choice. They are compared."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    new = list(range(512, len(tokenizer))) or None
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, suppress_tokens=new)
    return out[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tokens", [(), ("<tool>", "<call>")], ids=["", "with new tokens"])
def test_merged_model_equals_adapter_model(tied, tokens, write_recipe, train, tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, tied=tied)
    recipe = write_recipe(base_model=str(base), tokens=list(tokens), **LORA)
    train(recipe)
    merge(str(recipe), [])
    out = tmp_path / "out"

    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    plain = fresh(input_ids=torch.arange(20)[None]).logits
    if tokens:
        fresh.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = PeftModel.from_pretrained(fresh, str(out)).eval()
    ids = torch.arange(len(tokenizer) - 20, len(tokenizer))[None] if tokens else torch.arange(20)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert greedy(merged, tokenizer, "the quick brown") == greedy(adapted, tokenizer, "the quick brown")
    assert merged.config.vocab_size == (512 + len(tokens)) and merged.config.tie_word_embeddings == tied
    assert tokenizer.chat_template is not None
    if not tokens:
        assert (merged(input_ids=ids).logits - plain).abs().max() > 1e-3, "training changed something"


def test_shards_stay_shards_and_the_index_counts_true_bytes(write_recipe, train, tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, dtype="bfloat16")
    whole = tmp_path / "out"
    recipe = write_recipe(base_model=str(base), **LORA)
    train(recipe)
    merged_whole = load_file(merge_adapter(whole, str(base), whole / "merged").folder / "model.safetensors")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    result = merge_adapter(whole, str(sharded), tmp_path / "merged-shards")
    tensors = {}
    for path in result.folder.glob("*.safetensors"):
        tensors |= load_file(path)
    assert all(torch.equal(tensors[name], merged_whole[name]) for name in merged_whole)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values()), "the base's number format"
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values()) == result.num_bytes
    AutoModelForCausalLM.from_pretrained(result.folder)


def test_a_merge_that_is_cut_short_leaves_nothing_half_used(write_recipe, train, tmp_path, tiny_model, monkeypatch):
    recipe = write_recipe(**LORA)
    train(recipe)
    out = tmp_path / "out"

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    first = merge_adapter(out, str(tiny_model), out / "merged")
    before = (first.folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(merge_writer, "_write_config", full_disk)
    with pytest.raises(OSError):
        merge_adapter(out, str(tiny_model), out / "merged")
    assert (out / "merged" / "model.safetensors").read_bytes() == before, "the merge before it is kept"
    assert not list(out.glob(".*tmp"))


def test_a_folder_with_other_things_in_it_is_not_replaced(write_recipe, train, tmp_path, tiny_model):
    train(write_recipe(**LORA))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="Move it away first"):
        merge_adapter(tmp_path / "out", str(tiny_model), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_does_not_fit_is_refused_before_the_first_byte(
    write_recipe, train, tmp_path, tokenizer_folder, tiny_model
):
    train(write_recipe(**LORA))
    adapter, target = tmp_path / "out", tmp_path / "target"
    wider = make_model(tmp_path / "wider", tokenizer_folder, hidden_size=64)
    with pytest.raises(ModelError, match="does not fit the base model"):
        merge_adapter(adapter, str(wider), target)
    flatter = make_model(tmp_path / "flatter", tokenizer_folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match="matches no tensor of the base model"):
        merge_adapter(adapter, str(flatter), target)
    with pytest.raises(ModelError, match="is neither a folder nor reachable on the hub"):
        merge_adapter(adapter, "nobody/nothing", target)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    with pytest.raises(ModelError, match="use_qalora"):
        merge_adapter(adapter, str(tiny_model), target)
    assert not target.exists()


@pytest.mark.parametrize("harm", ["cut short", "not safetensors", "missing", "pickled", "no index", "8-bit floats"])
def test_a_damaged_base_is_refused(harm, write_recipe, train, tmp_path, tokenizer_folder):
    train(write_recipe(**LORA))
    base = make_model(tmp_path / "base", tokenizer_folder)
    weights = base / "model.safetensors"
    if harm == "cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif harm == "not safetensors":
        weights.write_bytes(struct.pack("<Q", 20) + b"x" * 100)
    elif harm == "8-bit floats":
        coarse = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(weights).items()}
        save_file(coarse, weights, metadata={"format": "pt"})
    else:
        weights.rename(base / "model-00001-of-00001.safetensors") if harm == "no index" else weights.unlink()
    if harm == "pickled":
        (base / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError) as error:
        merge_adapter(tmp_path / "out", str(base), tmp_path / "merged")
    said = {
        "pickled": "write `pickled_weights: true`",
        "missing": "has no model.safetensors",
        "no index": "1 shards, and no model.safetensors.index.json",
        "8-bit floats": "stored as F8_E4M3, which is too coarse",
    }
    assert said.get(harm, "Fetch it again") in str(error.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tied", [False, True], ids=["one file", "two files, tied"])
def test_pickled_weights_are_read_only_where_the_recipe_says_so(tied, write_recipe, train, tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, tied=tied)
    plain = write_recipe(base_model=str(base), **LORA)
    wanted = train(plain)
    merge(str(plain), ["verify=false"])
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = model.state_dict()  # of a tied model it has the head beside the embedding
    (base / "model.safetensors").unlink()
    if tied:
        parts = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        for name, part in zip(names, parts, strict=True):
            torch.save(part, base / name)
    else:
        torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled_weights: true"):
        train(plain, f"output_dir={tmp_path / 'refused'}")
    allowed = write_recipe("allowed.yml", base_model=str(base), pickled_weights=True, **LORA)
    again = tmp_path / "again"
    found = train(allowed, f"output_dir={again}")
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]
    merge(str(allowed), [f"output_dir={again}", "verify=false"])
    left, right = weights_of(again / "merged"), weights_of(tmp_path / "out" / "merged")
    assert all(torch.equal(left[name], right[name]) for name in right)


class Harm:
    """What a pickle can do: name a function to call as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_even_where_pickles_are_allowed(
    write_recipe, train, tmp_path, tokenizer_folder
):
    base = make_model(tmp_path / "base", tokenizer_folder)
    (base / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Harm(tmp_path / "ran")}, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="or would run code"):
        train(write_recipe(base_model=str(base), pickled_weights=True, **LORA))
    assert not (tmp_path / "ran").exists()


def test_streamed_files_are_what_the_library_reads(tmp_path):
    from finetuner.storage.safetensors_stream import NAMES, TensorInfo, write_stream

    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7, dtype=torch.int64),
        "c": torch.tensor(True),
        "d": torch.randn(4, 4).t(),
        "e": torch.zeros(0, 3),
    }
    infos = {name: TensorInfo(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    write_stream(tmp_path / "x.safetensors", infos, tensors.items())
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "y.safetensors")
    assert read_header(tmp_path / "y.safetensors").keys() == infos.keys()


def test_merge_is_a_function_that_returns_its_figures_and_prints_nothing(
    write_recipe, train, tmp_path, tokenizer_folder, capsys
):
    base = make_model(tmp_path / "base", tokenizer_folder, tied=True)
    recipe = write_recipe(base_model=str(base), **LORA | {"adapter": "qlora", "lora_target_modules": ["q_proj"]})
    train(recipe)
    capsys.readouterr()
    found = merge_trained(load(recipe).recipe)
    assert capsys.readouterr().out == ""
    assert (found.folder, found.num_tensors_merged, found.num_tensors_dequantized) == (tmp_path / "out/merged", 2, 14)
    tensors = weights_of(found.folder)
    assert found.num_tensors == len(tensors) and found.num_bytes == 4 * sum(t.numel() for t in tensors.values())
    assert found.verification is not None and found.verification.compared_on == "built-in prompts"
    assert found.notes == () and found.seconds > 0 and found.num_bytes_reused == 0
    (tmp_path / "out" / "quantization.json").unlink()  # an adapter of another tool, then
    options = MergeOptions(output=str(tmp_path / "again"), dequantize=True, verify=False)
    again = merge_trained(tmp_path / "out", options)
    assert again.verification is None and "nothing says" in again.notes[0]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights_of(again.folder).items())
    with pytest.raises(RecipeError, match="Leave out base_model"):
        merge_trained(load(recipe).recipe, MergeOptions(base_model="other"))
    with pytest.raises(RecipeError, match="3 % of a small update"):
        MergeOptions(dtype="int8")


def test_merge_of_a_full_fine_tune_says_where_the_weights_are(write_recipe):
    recipe = write_recipe()
    with pytest.raises(ModelError, match="there is no adapter to merge"):
        merge(str(recipe), [])


def test_run_folder_holds_what_the_design_promises(write_recipe, train, tmp_path):
    from finetuner.recipe import load_recipe

    recipe = write_recipe(val_set_size=2, eval_on_start=True, **LORA)
    rows = train(recipe)
    out = tmp_path / "out"
    assert load_recipe(out / "recipe.yml") == load_recipe(recipe), "the resolved recipe reproduces the run"
    logged = [row for row in rows if "loss" in row]
    keys = "step epoch loss learning_rate grad_norm num_tokens total_tokens tokens_per_second peak_memory_bytes"
    assert [list(row) for row in logged] == [keys.split()] * 3
    evaluated = ["step", "eval_loss", "eval_perplexity", "eval_bits_per_byte"]
    assert [list(row) for row in rows if "loss" not in row] == [evaluated] * 2
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000003"]
    assert AutoTokenizer.from_pretrained(out).chat_template is not None
    assert Path(out / "adapter_model.safetensors").stat().st_mode & 0o044, "others may read it, as the umask says"


def test_another_base_than_the_adapter_was_trained_on_is_refused(write_recipe, train, tmp_path, tokenizer_folder):
    recipe = write_recipe(**LORA)
    train(recipe)
    other = make_model(tmp_path / "same-shape", tokenizer_folder)
    with pytest.raises(ModelError, match="was trained on"):
        merge(str(recipe), [f"base_model={other}"])


def test_a_tokenizer_with_more_tokens_than_the_base_has_rows_is_trained_and_merged(
    write_recipe, train, tmp_path, tokenizer_folder
):
    larger = AutoTokenizer.from_pretrained(tokenizer_folder)
    larger.add_tokens(["<a>", "<b>"])
    larger.save_pretrained(tmp_path / "larger")
    recipe = write_recipe(tokenizer=str(tmp_path / "larger"), **LORA)
    train(recipe)
    merge(str(recipe), [])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == merged.config.vocab_size == len(larger)


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_a_chosen_end_of_text_reaches_the_configs_that_generation_reads(adapter, write_recipe, train, tmp_path):
    recipe = write_recipe(special_tokens={"eos_token": "<|im_end|>"}, max_steps=1, **adapter)
    train(recipe)
    folder = tmp_path / "out"
    if adapter:
        merge(str(recipe), [])
        folder = folder / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == wanted


KEPT = [
    ({"adapter": "qlora"}, "float32", 1e-5),
    ({"adapter": "qlora", "lora_target_modules": ["q_proj"], "bnb_config_kwargs": FP4}, "float32", 1e-5),
    ({"adapter": "qlora", "bf16": True}, "bfloat16", 3e-2),
    ({"adapter": "lora", "load_in_8bit": True}, "float32", 5e-3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "dtype", "bound"), KEPT, ids=["nf4", "fp4, one module", "nf4 in bf16", "8 bits"])
def test_an_adapter_of_a_quantized_base_is_merged_into_what_it_was_trained_on(
    keys, dtype, bound, write_recipe, train, tmp_path, tokenizer_folder, capsys
):
    """Its logits are those of the adapter on the quantized base; merged into the exact base, they are not."""
    base = make_model(tmp_path / "base", tokenizer_folder, dtype=dtype)
    recipe = write_recipe(base_model=str(base), **LORA | keys)
    train(recipe)
    out, number = tmp_path / "out", getattr(torch, dtype)
    merge(str(recipe), [])
    assert "14 tensors rounded as the quantized base was" in capsys.readouterr().out
    exact = tmp_path / "exact"
    shutil.copytree(out, exact, ignore=shutil.ignore_patterns("quantization.json", "merged"))
    merge_adapter(exact, str(base), exact / "merged")

    loaded = load(recipe).recipe
    form = choose_quant_format(loaded.adapter.adapter, loaded.quantization, number)
    quantized = load_model(str(base), dtype=number, attention=("sdpa",), quant_format=form)
    adapted = PeftModel.from_pretrained(quantized, str(out)).train()  # in eval, bitsandbytes may take other kernels
    ids = torch.arange(20)[None]
    wanted = adapted(input_ids=ids).logits.detach().float()

    def error(folder: Path) -> float:
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=number)
        return float((merged(input_ids=ids).logits.detach().float() - wanted).norm() / wanted.norm())

    assert error(out) < bound
    assert error(exact) > 2 * error(out)
