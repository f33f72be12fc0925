"""fp16 with its loss scaler, bf16 and fp32 on a real GPU: the same curve, and a resume that keeps the scaler."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.places import ROOT
from support.rows import RecipeWriter

from finetuner.training.metrics import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KEYS = {"max_steps": 12, "micro_batch_size": 4, "save_steps": 6, "adapter": "lora", "lr_scheduler": "constant"}


def run_on_gpu(recipe: Path, output: Path, *overrides: str) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    command = [sys.executable, "-m", "finetuner.train", str(recipe), f"output_dir={output}", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on cuda" in done.stdout
    return read_metrics(output / "metrics.jsonl")


@pytest.mark.parametrize("keys", [{"fp16": True}, {"bf16": True}], ids=["fp16", "bf16"])
@pytest.mark.parametrize("adapter", ["lora", None])
def test_sixteen_bits_follow_the_curve_of_fp32(keys, adapter, write_recipe: RecipeWriter, tmp_path: Path):
    recipe = write_recipe(**KEYS | {"adapter": adapter})
    exact = run_on_gpu(recipe, tmp_path / "fp32")
    half = run_on_gpu(write_recipe("half.yml", **KEYS | {"adapter": adapter} | keys), tmp_path / "half")
    assert [r["loss"] for r in half] == pytest.approx([r["loss"] for r in exact], rel=0.02)
    assert half[-1]["peak_memory_bytes"] <= torch.cuda.get_device_properties(0).total_memory


def test_the_loss_scaler_is_saved_and_restored(write_recipe: RecipeWriter, tmp_path: Path):
    recipe = write_recipe(**KEYS, fp16=True, bf16=False)
    unbroken = run_on_gpu(recipe, tmp_path / "a")
    middle = "checkpoints/step-00000006"
    assert json.loads((tmp_path / "a" / middle / "scaler.json").read_text())["scale"] > 0
    shutil.copytree(tmp_path / "a" / middle, tmp_path / "b" / middle)
    resumed = run_on_gpu(recipe, tmp_path / "b", "resume_from_checkpoint=true")
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in unbroken[6:]], rel=1e-3)
