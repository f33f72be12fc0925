"""Model FLOPs and their share of a device's peak: against a count of what is computed, and by hand."""

import json

import pytest
import torch
from support.tiny import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from finetuner.data.batches import BatchLayout, collate
from finetuner.estimate.fit import trained_tensors
from finetuner.models.empty_model import meta_model
from finetuner.models.from_scratch import scratch_config
from finetuner.models.model_flops import training_flops
from finetuner.plan.flops import TrainingFlops, parts_of_shape, peak_of, training_flops_of_shape
from finetuner.recipe.gpt_shape import PRESETS, shape_of, tensors_of_shape
from finetuner.recipe.sections import GPTSection

LLAMA_MIX = {"preset": "gpt-nano", "bias": True, "tie_embeddings": False, "key_value_heads": 2, "norm": "layer"}


class Words:
    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return 1000


@pytest.mark.parametrize("choices", [*({"preset": name} for name in PRESETS), LLAMA_MIX], ids=[*PRESETS, "mixed"])
def test_the_parts_and_the_work_of_a_shape_are_those_of_its_model(choices):
    shape = shape_of(GPTSection(**choices))
    model = meta_model(scratch_config(GPTSection(**choices), Words()), dtype=torch.float32, attention=("sdpa",))
    assert sum(parts_of_shape(shape, 1000).values()) == model.num_parameters()
    assert training_flops_of_shape(shape, 1000) == training_flops(model, model, 64)
    ours, theirs = tensors_of_shape(shape, 1000), trained_tensors(model)
    assert sorted(map(str, ours)) == sorted(map(str, theirs))


@pytest.mark.parametrize("lora", [False, True])
def test_the_formula_counts_what_a_training_step_multiplies(lora, tmp_path, tokenizer_folder):
    """Plain attention computes the pairs that the mask hides as well: 12 instead of 6 a layer, width and pair."""
    folder = make_model(tmp_path, tokenizer_folder)
    bare = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = bare
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(bare, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    work = training_flops(model, bare, 32)
    expected = TrainingFlops(work.per_token, work.per_trained, 2 * work.per_pair).flops_of_rows(3 * 32, 32)
    # the first layer's input needs no gradient under LoRA, of which the formula knows nothing
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1 if lora else 0.002)


def test_what_the_formula_does_not_hold_for_has_no_figure(tiny_model):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=32, moe_intermediate_size=16, num_experts=4,
    )  # fmt: skip
    experts = meta_model(config, dtype=torch.float32, attention=("sdpa",))
    assert training_flops(experts, experts, 8) is None
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert training_flops(model, model, 16) is not None
    model.config.sliding_window = 16
    assert training_flops(model, model, 16) is not None and training_flops(model, model, 17) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("RTX4090", 165e12),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_peaks_are_of_devices_that_a_data_sheet_is_known_of(name, peak):
    assert peak_of(name) == peak


class Documents:
    """Two rows: documents of 5 and 3 tokens, and one of 4."""

    def documents(self, row):
        import numpy as np

        return [(np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32)) for n in ([5, 3], [4])[row]]


@pytest.mark.parametrize("flat", [False, True])
def test_a_batch_counts_the_pairs_within_its_documents(flat):
    assert collate(Documents(), [0, 1], BatchLayout(packed=True, flat=flat)).num_pairs == 25 + 9 + 16


@pytest.mark.slow
def test_the_utilisation_is_work_over_time_over_the_peak_and_absent_where_no_peak_is_known(
    write_recipe, train, tiny_model, tmp_path, capsys
):
    recipe = write_recipe(max_steps=4, micro_batch_size=4, logging_steps=2)
    assert all("mfu" not in row for row in train(recipe)) and "MFU" not in capsys.readouterr().out
    rows = train(recipe, f"output_dir={tmp_path / 'known'}", "device_peak_flops=1e9", "sequence_len=512")
    assert "  MFU " in capsys.readouterr().out
    config = json.loads((tiny_model / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    matrices = 2 * (width * width * 2 + 2 * width * (width // 2) + 3 * width * inner)
    for row in rows:
        least = 6 * matrices * row["tokens_per_second"] / 1e9  # without head and attention
        assert least < row["mfu"] < 2 * least
