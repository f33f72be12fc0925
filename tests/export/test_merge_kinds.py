"""Adapters as PEFT and other tools write them, merged file by file, against PEFT's own adapted model."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import KINDS, adapt
from support.places import ROOT
from support.results import weights_of
from support.tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.commands.merge import merge
from finetuner.errors import ModelError, RecipeError
from finetuner.export.merge_options import read_merge_options
from finetuner.export.merge_plan import MergeFormat
from finetuner.export.merge_writer import merge_adapter
from finetuner.export.model_card import write_card
from finetuner.export.verify_logits import verify_logits
from finetuner.storage.atomic import staging_of

# What PEFT computes in bf16 as in fp32: the others it rounds on the way.
EXACT = ("plain", "rank and alpha patterns", "rsLoRA with a pattern", "one layer", "without some", "norms whole")


def greedy(model) -> list[int]:
    ids = torch.tensor([[3, 9, 100, 101]])
    return model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[0].tolist()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_adapted_is_what_the_merged_files_compute(kind, tied, tmp_path, tiny_model, tied_model):
    base = tied_model if tied else tiny_model
    if not tied and "together" in kind:
        pytest.skip("nothing is tied")
    adapted = adapt(base, tmp_path / "adapter", **KINDS[kind])
    merge_adapter(tmp_path / "adapter", str(base), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(0, 512, 7)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    wanted = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert greedy(merged) == greedy(adapted)
    assert (wanted - plain).abs().max() > 1e-3
    alone = tied and kind in ("embedding", "embedding and head", "head", "head whole", "embedding whole", "both whole")
    assert merged.config.tie_word_embeddings == (tied and not alone)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float32") for kind in KINDS if "together" not in kind] + [(kind, "bfloat16") for kind in EXACT],
)
def test_merged_weights_are_pefts_to_the_bit(kind, dtype, tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, dtype=dtype)
    adapt(base, tmp_path / "adapter", **KINDS[kind])
    result = merge_adapter(tmp_path / "adapter", str(base), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    ours = load_file(result.folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_biases_of_the_adapter_and_of_the_base_are_merged(tmp_path, tokenizer_folder):
    base = tmp_path / "base"
    make_model(base, tokenizer_folder)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(base)
    config.attention_bias = True
    LlamaForCausalLM(config).save_pretrained(base)
    ids = torch.arange(20)[None]
    for name, keys in {"own": {"lora_bias": True}, "the base's": {"bias": "all"}}.items():
        adapted = adapt(base, tmp_path / name, target_modules=["q_proj", "v_proj"], **keys)
        merge_adapter(tmp_path / name, str(base), tmp_path / name / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name / "merged")
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_changed_its_base_at_the_start_or_is_broken_is_refused(tmp_path, tiny_model):
    folder = tmp_path / "adapter"
    adapt(tiny_model, folder, target_modules=["q_proj"])
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    with pytest.raises(ModelError, match="changed the base as training began"):
        merge_adapter(folder, str(tiny_model), tmp_path / "merged")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * float("nan")}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        merge_adapter(folder, str(tiny_model), tmp_path / "merged")
    save_file(tensors | {"base_model.model.extra.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="matches no tensor of the base"):
        merge_adapter(folder, str(tiny_model), tmp_path / "merged")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="is pickled"):
        merge_adapter(folder, str(tiny_model), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_number_format_and_shards_are_as_asked(tmp_path, tied_model):
    folder = tmp_path / "adapter"
    adapt(tied_model, folder, target_modules=["q_proj", "lm_head"])
    merge(str(folder), [f"output={tmp_path / 'whole'}", "dtype=bfloat16"])
    merge(str(folder), [f"output={tmp_path / 'parts'}", "dtype=bfloat16", "shard_size=60KB"])
    parts = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05}.safetensors"
    whole, sharded = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], sharded[name]) for name in whole) and whole.keys() == sharded.keys()
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in whole.values())
    for name in ("whole", "parts"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).dtype == torch.bfloat16
    sizes = [path.stat().st_size for path in (tmp_path / "parts").glob("*.safetensors")]
    assert sum(size > 64_000 for size in sizes) <= 2, "only a tensor that is larger by itself makes a larger file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dtype=int8"], "3 % of a small update"),
        (["dtype=bf17"], "bfloat16, float16, float32"),
        (["base=elsewhere"], "base_model=elsewhere"),
        (["shard_size=5"], "shard_size=5GB"),
        (["output="], "output=..."),
    ],
)
def test_a_wrong_option_is_answered_with_what_to_write(words, message):
    with pytest.raises(RecipeError, match=message):
        read_merge_options(words)


def test_a_folder_is_not_merged_onto_itself_and_takes_no_recipe_keys(tmp_path, tiny_model):
    folder = tmp_path / "adapter"
    adapt(tiny_model, folder, target_modules=["q_proj"])
    with pytest.raises(RecipeError, match="learning_rate=1"):
        merge(str(folder), ["learning_rate=1"])
    with pytest.raises(ModelError, match="the folder of the base model itself"):
        merge(str(folder), [f"output={tiny_model}"])
    with pytest.raises(ModelError, match="the folder of the adapter itself"):
        merge(str(folder), [f"output={folder}"])
    with pytest.raises(ModelError, match="is not the folder of an adapter"):
        merge(str(tmp_path), [])


def test_a_value_beyond_float16_is_an_error_and_nothing_is_left(tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapt(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*Write dtype=bfloat16"):
        merge_adapter(tmp_path / "adapter", str(base), tmp_path / "merged", form=MergeFormat(torch.float16))
    assert not list(tmp_path.glob("*merged*"))


def test_generation_stops_at_the_end_of_a_turn_and_at_the_end_of_text(tmp_path, tiny_model, write_recipe, train):
    folder = tmp_path / "adapter"
    adapt(tiny_model, folder, target_modules=["q_proj"])
    merge_adapter(folder, str(tiny_model), tmp_path / "merged")
    train(write_recipe(max_steps=1))  # the whole model
    for result in (tmp_path / "merged", tmp_path / "out"):
        tokenizer = AutoTokenizer.from_pretrained(result)
        model = AutoModelForCausalLM.from_pretrained(result)
        stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        assert model.generation_config.eos_token_id == stops, result


@pytest.mark.slow
def test_a_killed_merge_goes_on_behind_the_files_it_had_finished(tmp_path, tokenizer_folder):
    base = make_model(tmp_path / "base", tokenizer_folder, hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    folder, output = tmp_path / "adapter", tmp_path / "merged"
    adapt(base, folder, target_modules="all-linear")
    form = "MergeFormat(shard_bytes=2_000_000)"
    code = f"""
import time
from pathlib import Path
from finetuner.export.model_card import write_card
from finetuner.export.merge_plan import MergeFormat
from finetuner.export.merge_writer import merge_adapter
from finetuner.export.verify_logits import verify_logits
merge_adapter(Path({str(folder)!r}), {str(base)!r}, Path({str(output)!r}), lambda *a: time.sleep(0.02), form={form})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    aside = staging_of(output)
    deadline = time.monotonic() + 60
    while len(list(aside.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in aside.glob("*.safetensors")}
    assert len(finished) >= 3 and not output.exists()
    result = merge_adapter(folder, str(base), output, form=MergeFormat(shard_bytes=2_000_000))
    assert all((output / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert 0 < result.num_bytes_reused < result.num_bytes
    fresh = merge_adapter(folder, str(base), tmp_path / "fresh")
    left, right = weights_of(output), weights_of(fresh.folder)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert {path.suffix for path in output.iterdir()} <= {".safetensors", ".json", ".jinja"}
    # Another adapter is another piece of work: nothing that an earlier one left is used.
    (tmp_path / "killed").mkdir()
    output.rename(aside)
    (aside / "work.json").write_text("of something else")
    assert merge_adapter(folder, str(base), output, form=MergeFormat(shard_bytes=2_000_000)).num_bytes_reused == 0


def test_the_merged_files_are_read_back_and_compared_with_what_was_trained(tmp_path, tiny_model, capsys):
    folder, out = tmp_path / "adapter", tmp_path / "merged"
    adapt(tiny_model, folder, target_modules="all-linear")
    merge(str(folder), [f"output={out}"])
    assert (
        "verified, read back, against base + adapter in fp32 on built-in prompts: largest logit"
        in capsys.readouterr().out
    )
    verified = json.loads((out / "merge.json").read_text())["verified"]
    assert verified["kl"] < 1e-9 and verified["same_choice"] == 1 and verified["num_tokens"] > 50
    merge(str(folder), [f"output={out}", "dtype=bfloat16"])
    assert 1e-9 < json.loads((out / "merge.json").read_text())["verified"]["kl"] < 1e-2
    merge(str(folder), [f"output={out}", "verify=false"])
    assert "verified" not in json.loads((out / "merge.json").read_text())
    tensors = load_file(out / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    lost = "model.layers.1.mlp.down_proj.weight"  # one layer in which the update is missing
    save_file(tensors | {lost: base[lost]}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not what base \\+ adapter compute"):
        verify_logits(folder, str(tiny_model), out)


def test_the_card_says_what_the_result_was_made_of(write_recipe, train, tmp_path):
    recipe = write_recipe(adapter="lora", lora_r=4, max_steps=2, val_set_size=2, eval_on_start=True)
    train(recipe)
    merge(str(recipe), [])
    for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
        card = (folder / "README.md").read_text()
        for part in ("| trained on | `rows.jsonl` | alpaca |", "lora_r: 4", "held-out loss", "torch 2", "2 steps"):
            assert part in card
    assert "KL divergence" in (tmp_path / "out" / "merged" / "README.md").read_text()
    mine = tmp_path / "out" / "README.md"
    mine.write_text("my own words")
    write_card(mine.parent, mine.parent, "base", "An adapter")
    assert mine.read_text() == "my own words"
