"""What was merged is compared with what was trained: by logits on held-out rows, or tensor by tensor from the disk; and
adapters of other tools are merged onto the base that they were trained on."""

import json
import shutil

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from support.adapters import KINDS, adapt
from support.results import weights_of
from support.tiny import make_model

from finetuner.commands.merge import merge
from finetuner.errors import ModelError
from finetuner.export.merge_plan import MergeFormat
from finetuner.export.merge_writer import merge_adapter
from finetuner.export.verify_tensors import verify_tensors


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("plain", "float32"),
        ("plain", "bfloat16"),
        ("plain", "float16"),
        ("dora", "bfloat16"),
        ("head", "bfloat16"),
        ("token rows", "bfloat16"),
    ],
)
def test_tensor_by_tensor_a_sound_merge_is_within_one_rounding_and_a_lost_update_is_not(
    kind, dtype, tmp_path, tokenizer_folder
):
    base = make_model(tmp_path / "base", tokenizer_folder, tied=True, dtype=dtype)
    adapt(base, tmp_path / "adapter", **KINDS[kind])
    out = merge_adapter(tmp_path / "adapter", str(base), tmp_path / "merged").folder
    found = verify_tensors(tmp_path / "adapter", base, out, MergeFormat())
    assert found.largest <= (0 if dtype == "float32" else 1) and found.num_changed > 0
    assert json.loads((out / "merge.json").read_text())["verified_by_layers"]["num_tensors"] == found.num_tensors
    tensors, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    changed = next(name for name in sorted(before) if not torch.equal(tensors[name], before[name]))
    save_file(tensors | {changed: before[changed]}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"not what base \+ adapter are: .*in {changed}"):
        verify_tensors(tmp_path / "adapter", base, out, MergeFormat())
    del tensors[changed]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"'{changed}' is missing"):
        verify_tensors(tmp_path / "adapter", base, out, MergeFormat())


def test_a_number_that_is_not_one_is_no_rounding(tmp_path, tiny_model):
    adapt(tiny_model, tmp_path / "adapter", **KINDS["plain"])
    out = merge_adapter(tmp_path / "adapter", str(tiny_model), tmp_path / "merged").folder
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"nan roundings .*in model\.norm\.weight"):
        verify_tensors(tmp_path / "adapter", tiny_model, out, MergeFormat())


def test_a_merge_is_verified_on_held_out_rows_or_prompts_or_by_tensors_and_says_which(
    write_recipe, train, tmp_path, capsys, monkeypatch
):
    recipe = write_recipe(adapter="qlora", lora_r=4, max_steps=2, val_set_size=3, learning_rate=0.02)
    train(recipe)
    capsys.readouterr()
    merge(str(recipe), [])
    assert "on 3 held-out rows of the recipe: largest logit difference" in capsys.readouterr().out
    assert "on 3 held-out rows" in (tmp_path / "out" / "merged" / "README.md").read_text()
    shutil.rmtree(tmp_path / "prepared")
    merge(str(recipe), [])
    assert "on built-in prompts: largest logit difference" in capsys.readouterr().out
    monkeypatch.setattr(
        "finetuner.export.merge.memory_shortage", lambda base: "it takes 99.0 GB of memory, and 1.0 are free"
    )
    merge(str(recipe), ["dtype=bfloat16"])
    shown = capsys.readouterr().out
    assert "verifying tensor by tensor, because base + adapter cannot be held: it takes 99.0 GB" in shown
    assert "largest difference" in shown and "14 of them changed by the adapter" in shown


def roundtrip(weight: torch.Tensor, *, double: bool = True, kind: str = "nf4") -> torch.Tensor:
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    return functional.dequantize_4bit(codes, state)


SETTINGS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.mark.slow
def test_an_adapter_of_another_tool_is_merged_onto_what_bitsandbytes_makes_of_the_base(tmp_path, tied_model, capsys):
    folder = tmp_path / "adapter"
    adapt(tied_model, folder, target_modules=["q_proj", "down_proj"])
    before = load_file(tied_model / "model.safetensors")
    plain = merge_adapter(folder, str(tied_model), tmp_path / "plain")
    update = {name: tensor - before[name] for name, tensor in weights_of(plain.folder).items()}
    linear = [name for name in before if name.endswith("_proj.weight")]
    assert len(linear) == 14

    def merged(*words: str) -> dict[str, torch.Tensor]:
        merge(str(folder), [f"output={tmp_path / 'out'}", *words])
        return weights_of(tmp_path / "out")

    as_it_is = merged()
    assert "base=dequantized" in capsys.readouterr().out, "nothing says how it was trained"
    assert all(torch.equal(as_it_is[name], tensor) for name, tensor in weights_of(plain.folder).items())
    rounded = merged("base=dequantized")
    assert "nf4, double quantized" in capsys.readouterr().out
    for name, tensor in rounded.items():
        if name in linear and not update[name].any():
            assert torch.equal(tensor, roundtrip(before[name])), name
        elif name in linear:
            torch.testing.assert_close(tensor, roundtrip(before[name]) + update[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name]), f"{name}: embeddings, head and norms stay"
    (folder / "config.json").write_text(json.dumps({"quantization_config": SETTINGS}))  # as a tool may leave it
    known = merged()
    assert "as its settings say" in capsys.readouterr().out
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(known[name], roundtrip(before[name], double=False, kind="fp4"))
    skips = {"quantization_config": SETTINGS | {"llm_int8_skip_modules": ["lm_head", "k_proj"]}}
    (folder / "config.json").write_text(json.dumps(skips))
    assert torch.equal(merged()[name], before[name])
    assert torch.equal(merged("base=original")[name], before[name])
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"quantized by gptq.*\n.*base=original"):
        merged()


def test_what_a_recipe_trained_in_4_bits_is_merged_alike_without_its_record(write_recipe, train, tmp_path):
    recipe = write_recipe(adapter="qlora", lora_r=4, max_steps=2, learning_rate=0.02)
    train(recipe)
    out = tmp_path / "out"
    merge(str(recipe), ["verify=false"])
    wanted = weights_of(out / "merged")
    (out / "quantization.json").unlink()
    merge(str(out), ["base=dequantized", "verify=false"])
    found = weights_of(out / "merged")
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
