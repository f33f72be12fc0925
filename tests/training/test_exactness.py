"""One gradient for every split of a batch; a resumed run is the unbroken run, bit by bit."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.places import ROOT
from support.processes import run_command
from support.results import largest_difference, weights_of
from support.rows import alpaca_rows, write_rows

LORA = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}


@pytest.fixture
def unequal_rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "unequal.jsonl", alpaca_rows(80))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_four_splits_of_a_batch_give_one_gradient(adapter, unequal_rows, write_recipe, train, tmp_path):
    """1x16x1, 1x4x4, 1x1x16 and 2x4x2 (ranks x micro-batch x accumulation) of the same 16 rows, 5 steps.

    What is left is the order of fp32 sums; AdamW divides by the gradient's size and so makes it proportional to the
    learning rate, here that of the known LoRA recipes. Its epsilon is 1e-6 here: with 1e-8 a weight whose gradient is
    that small moves by what the last digit of a sum happened to be (1.1e-6 seen, in one weight).
    """
    data = [{"path": str(unequal_rows), "type": "alpaca"}]
    recipe = write_recipe(
        datasets=data, max_steps=5, learning_rate=2e-4, adam_epsilon=1e-6, lr_scheduler="constant", seed=7, **adapter
    )

    def split(micro: int, accum: int) -> tuple[str, ...]:
        out = tmp_path / f"{micro}x{accum}"
        return (f"micro_batch_size={micro}", f"gradient_accumulation_steps={accum}", f"output_dir={out}")

    rows = train(recipe, *split(16, 1))
    reference = weights_of(tmp_path / "16x1")
    for micro, accum in ((4, 4), (1, 16)):
        other = train(recipe, *split(micro, accum))
        assert largest_difference(reference, weights_of(tmp_path / f"{micro}x{accum}")) < 1e-6
        assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in rows], rel=1e-6)
        assert [r["grad_norm"] for r in other] == pytest.approx([r["grad_norm"] for r in rows], rel=1e-5)
        assert [r["num_tokens"] for r in other] == [r["num_tokens"] for r in rows]

    done = run_command("finetuner.train", recipe, *split(4, 2), ranks=2)
    assert done.code == 0, done.text
    assert largest_difference(reference, weights_of(tmp_path / "4x2")) < 1e-6
    assert done.out.count("global batch") == 1, "one rank prints"
    from finetuner.training.metrics import read_metrics

    two_ranks = read_metrics(tmp_path / "4x2" / "metrics.jsonl")
    assert [r["learning_rate"] for r in two_ranks] == [r["learning_rate"] for r in rows]
    assert [r["grad_norm"] for r in two_ranks] == pytest.approx([r["grad_norm"] for r in rows], rel=1e-5)


@pytest.mark.slow
def test_an_odd_number_of_rows_is_trained_on_once_an_epoch_whatever_the_split(
    unequal_rows, write_recipe, train, tmp_path
):
    """13 rows in steps of 6: the last step of the epoch has one row, and filler rows where others have none."""
    data = [{"path": str(write_rows(tmp_path / "13.jsonl", alpaca_rows(13))), "type": "alpaca"}]
    recipe = write_recipe(datasets=data, num_epochs=2, learning_rate=2e-4)
    whole = train(recipe, "micro_batch_size=6", f"output_dir={tmp_path / 'a'}")
    split = train(recipe, "micro_batch_size=2", "gradient_accumulation_steps=3", f"output_dir={tmp_path / 'b'}")
    assert len(whole) == 6 and whole[-1]["epoch"] == 2.0
    assert [r["num_tokens"] for r in split] == [r["num_tokens"] for r in whole]
    assert whole[2]["total_tokens"] * 2 == whole[5]["total_tokens"]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-6


COMPARED = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "total_tokens")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, LORA | {"lora_dropout": 0.2}], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("stop", [3, 7], ids=["in the first epoch", "in the second epoch"])
def test_resumed_run_is_bitwise_the_unbroken_run(adapter, stop, write_recipe, train, tmp_path):
    """20 rows, 5 steps an epoch, two epochs; attention dropout where there is no adapter's."""
    recipe = write_recipe(
        num_epochs=2, micro_batch_size=2, gradient_accumulation_steps=2, save_steps=1, save_total_limit=20, **adapter
    )
    unbroken = train(recipe, f"output_dir={tmp_path / 'unbroken'}")
    broken = tmp_path / "broken"
    shutil.copytree(
        tmp_path / "unbroken" / "checkpoints" / f"step-{stop:08}", broken / "checkpoints" / f"step-{stop:08}"
    )
    shutil.copy(tmp_path / "unbroken" / "metrics.jsonl", broken)  # rows of steps after the checkpoint must go
    resumed = train(recipe, f"output_dir={broken}", "resume_from_checkpoint=true")
    assert [{k: r[k] for k in COMPARED} for r in resumed] == [{k: r[k] for k in COMPARED} for r in unbroken]
    assert largest_difference(weights_of(tmp_path / "unbroken"), weights_of(broken)) == 0.0
    last = f"checkpoints/step-{10:08}/optimizer.safetensors"
    assert (tmp_path / "unbroken" / last).read_bytes() == (broken / last).read_bytes()


@pytest.mark.slow
def test_dropout_differs_between_steps_and_between_seeds(write_recipe, train, tmp_path):
    recipe = write_recipe(
        max_steps=2, **(LORA | {"lora_dropout": 0.5, "lr_scheduler": "constant", "micro_batch_size": 20})
    )
    first = train(recipe, f"output_dir={tmp_path / 'a'}")
    again = train(recipe, f"output_dir={tmp_path / 'b'}")
    other = train(recipe, f"output_dir={tmp_path / 'c'}", "seed=43")
    assert [r["grad_norm"] for r in first] == [r["grad_norm"] for r in again]
    assert [r["grad_norm"] for r in first] != [r["grad_norm"] for r in other]


@pytest.mark.slow
def test_a_run_resumed_with_another_split_stays_on_the_curve(write_recipe, train, tmp_path):
    recipe = write_recipe(num_epochs=2, save_steps=5, **LORA)
    split = ("micro_batch_size=4", "gradient_accumulation_steps=1")
    unbroken = train(recipe, *split, f"output_dir={tmp_path / 'a'}")
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-00000005", tmp_path / "b" / "checkpoints" / "step-00000005")
    other = ("micro_batch_size=1", "gradient_accumulation_steps=4")
    resumed = train(recipe, *other, f"output_dir={tmp_path / 'b'}", "resume_from_checkpoint=true")
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in unbroken[5:]], rel=1e-5)
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_moments_in_8_bits_resume_bitwise_and_go_where_those_in_32_go(optimizer, write_recipe, train, tmp_path):
    recipe = write_recipe(
        num_epochs=2, micro_batch_size=4, save_steps=1, save_total_limit=20, learning_rate=1e-3, optimizer=optimizer
    )
    unbroken = train(recipe, f"output_dir={tmp_path / 'unbroken'}")
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "unbroken" / "checkpoints" / "step-00000004", broken / "checkpoints" / "step-00000004")
    resumed = train(recipe, f"output_dir={broken}", "resume_from_checkpoint=true")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in unbroken if r["step"] > 4]
    assert largest_difference(weights_of(tmp_path / "unbroken"), weights_of(broken)) == 0.0
    train(recipe, f"output_dir={tmp_path / 'full'}", "optimizer=adamw_torch")
    assert 0.0 < largest_difference(weights_of(tmp_path / "unbroken"), weights_of(tmp_path / "full")) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_stopped_run_resumes_to_the_same_weights(how, write_recipe, train, tmp_path):
    """Stopped at no chosen moment after the first checkpoint; then the same command again."""
    recipe = write_recipe(num_epochs=40, micro_batch_size=4, save_steps=3, resume_from_checkpoint=True, **LORA)
    stopped = tmp_path / "stopped"
    unbroken = train(recipe, f"output_dir={tmp_path / 'unbroken'}")
    process = subprocess.Popen(
        [sys.executable, "-m", "finetuner.train", recipe, f"output_dir={stopped}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(stopped.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("resume with: accelerate launch" in out) == (how == signal.SIGINT)
    resumed = train(recipe, f"output_dir={stopped}")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in unbroken]
    assert largest_difference(weights_of(tmp_path / "unbroken"), weights_of(stopped)) == 0.0


def test_the_loss_of_held_out_rows_does_not_depend_on_the_batch_size(write_recipe, train, tmp_path):
    recipe = write_recipe(val_set_size=7, max_steps=1, learning_rate=1e-9)
    losses = [
        train(recipe, f"eval_batch_size={size}", f"output_dir={tmp_path / str(size)}")[-1]["eval_loss"]
        for size in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_weights_that_train_are_fp32_and_move_at_a_small_rate(write_recipe, train, tmp_path, tiny_model):
    """In bf16, 84 % of weights would not move at this rate."""
    recipe = write_recipe(max_steps=2, learning_rate=1e-5, lr_scheduler="constant", bf16=True, save_steps=1)
    train(recipe)
    from safetensors.torch import load_file

    after = load_file(tmp_path / "out" / "checkpoints" / "step-00000002" / "model.safetensors")
    before = load_file(tiny_model / "model.safetensors")
    matrices = [name for name in before if before[name].ndim == 2 and "embed" not in name]
    assert all(after[name].dtype == torch.float32 for name in after)
    moved = sum(int((before[n] != after[n]).sum()) for n in matrices) / sum(before[n].numel() for n in matrices)
    assert moved > 0.99
