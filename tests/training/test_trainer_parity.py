"""The same curve as transformers' Trainer, step for step."""

import importlib.util

import pytest
from support.places import ROOT
from support.rows import alpaca_rows, write_rows


def _benchmark():
    spec = importlib.util.spec_from_file_location("trainer_parity", ROOT / "benchmarks" / "trainer_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler": "linear", "weight_decay": 0.1},
        {"lr_scheduler": "cosine", "adapter": "lora", "lora_r": 4},
        {"lr_scheduler": "constant", "gradient_accumulation_steps": 3, "micro_batch_size": 2},
    ],
    ids=["full linear decay", "lora cosine", "full accumulated"],
)
def test_ten_losses_and_gradient_norms_equal_those_of_transformers_trainer(keys, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    rows = write_rows(tmp_path / "many.jsonl", alpaca_rows(80))
    recipe = write_recipe(
        datasets=[{"path": str(rows), "type": "alpaca"}], warmup_steps=2, **({"micro_batch_size": 4} | keys)
    )
    ours, theirs = _benchmark().compare(str(recipe), [], steps=10)
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], abs=1e-4)
    assert [r["grad_norm"] for r in ours] == pytest.approx([float(r["grad_norm"]) for r in theirs], rel=1e-3)
