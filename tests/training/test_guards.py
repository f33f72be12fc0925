"""What ends a run early, what is kept of it, and that it goes on as if it had not been stopped."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.places import ROOT
from support.processes import run_command
from support.results import weights_of
from support.rows import alpaca_rows, write_rows

from finetuner.checkpoint.folder import list_checkpoints, newest_intact, read_saved_state
from finetuner.errors import CheckpointError, RecipeError, TrainingError
from finetuner.plan.schedule import Schedule
from finetuner.recipe import load
from finetuner.recipe.sections import GuardSection
from finetuner.training.guards import Guards
from finetuner.training.state import TrainState
from finetuner.training.stopping import stop_requests

# Learns its few rows by heart: the held-out loss falls and then rises.
OVERFITS = {
    "val_set_size": 6, "learning_rate": 0.01, "lr_scheduler": "constant", "micro_batch_size": 7, "num_epochs": 20,
    "evals_per_epoch": 1,
}  # fmt: skip


def steps_saved(out: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(out)]


# --- the rules, as functions of the state ---


def test_skipped_steps_are_counted_and_end_the_run_only_in_a_row():
    guards = Guards(max_skipped_steps=2)
    state = TrainState()
    for updated in (False, False, True, False, False):
        state = guards.after_step(state, updated=updated, loss=1.0)
        guards.require_sound(state, loss=1.0, grad_norm=1.0, peak_lr=0.1)
    assert (state.bad_steps, state.skipped_steps) == (2, 4)
    state = guards.after_step(state, updated=False, loss=math.nan)
    with pytest.raises(TrainingError, match="in 3 steps in a row"):
        guards.require_sound(state, loss=math.nan, grad_norm=1.0, peak_lr=0.1)


def test_the_watchdog_counts_high_losses_in_a_row():
    guards = Guards(highest_loss=5.0, loss_patience=2)
    state = TrainState()
    for loss, count in ((6.0, 1), (5.0, 0), (7.0, 1), (8.0, 2)):
        state = guards.after_step(state, updated=True, loss=loss)
        assert state.high_loss_steps == count
    with pytest.raises(TrainingError, match=r"above loss_watchdog_threshold \(5.0\) in 2 steps"):
        guards.require_sound(state, loss=8.0, grad_norm=1.0, peak_lr=0.1)


def test_early_stopping_waits_for_a_loss_that_is_lower_by_the_threshold():
    guards = Guards(eval_patience=2, least_gain=0.1)
    state = TrainState(step=1)
    for loss, best, waited in ((3.0, 3.0, 0), (2.95, 3.0, 1), (2.8, 2.8, 0), (math.nan, 2.8, 1), (2.75, 2.8, 2)):
        assert not state.stopped_early
        state = guards.after_evaluation(state, loss)
        assert (state.best_eval_loss, state.evals_without_gain) == (best, waited)
    assert state.stopped_early


def test_limits_default_by_precision():
    section = GuardSection()
    assert Guards.from_section(section, "bf16", None).max_skipped_steps == 2
    assert Guards.from_section(section, "fp16", None).max_skipped_steps == 19
    assert Guards.from_section(GuardSection(max_skipped_steps=7), "fp16", None).max_skipped_steps == 7
    assert Guards.from_section(section, "fp32", "best").saves_best


@pytest.mark.parametrize(
    ("keys", "evaluates", "saves"),
    [
        ({}, [2, 4, 5], [2, 4, 5]),
        ({"eval_strategy": "no", "save_strategy": "no"}, [], []),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [2, 4, 5], [2, 4, 5]),
        ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "saves_per_epoch": 2}, [3, 5],
         [1, 2, 3, 4, 5]),
        ({"save_strategy": "best", "save_first_step": True}, [2, 4, 5], [1]),
        ({"save_strategy": "no", "save_first_step": True}, [2, 4, 5], [1]),
    ],
)  # fmt: skip
def test_strategies_say_when(keys, evaluates, saves, write_recipe):
    recipe = load(write_recipe(val_set_size=2, num_epochs=2.5, **keys)).recipe
    schedule = Schedule.from_sections(recipe.schedule, recipe.evaluation, recipe.output, num_rows=4, global_batch=2)
    assert [done for done in range(1, 6) if schedule.evaluates_at(done)] == evaluates
    assert [done for done in range(1, 6) if schedule.saves_at(done)] == saves
    assert schedule.saves_at(3, last=True) == (keys.get("save_strategy") not in ("no", "best"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"save_strategy": "steps"}, "does not say how often"),
        ({"eval_strategy": "epoch", "eval_steps": 3, "val_set_size": 1}, "no effect with `eval_strategy: epoch`"),
        ({"early_stopping_patience": 2}, "looks at the held-out loss"),
        ({"load_best_model_at_end": True, "val_set_size": 1, "eval_strategy": "no"}, "takes none"),
        ({"load_best_model_at_end": True, "val_set_size": 1, "save_strategy": "no"}, "saves none"),
        ({"save_only_model": True, "resume_from_checkpoint": True}, "no run can go on"),
        ({"loss_watchdog_patience": 2}, "without loss_watchdog_threshold"),
        ({"early_stopping_threshold": 0.1}, "without early_stopping_patience"),
        ({"metric_for_best_model": "eval_bleu"}, "a metric other than eval_loss"),
        ({"greater_is_better": True}, "better when lower"),
    ],
)
def test_what_contradicts_itself_is_refused(keys, message, write_recipe):
    with pytest.raises(RecipeError, match=message):
        load(write_recipe(**keys))


def test_axolotls_words_for_the_same_are_understood(write_recipe):
    recipe = load(
        write_recipe(auto_resume_from_checkpoints=True, metric_for_best_model="eval_loss", greater_is_better=False)
    ).recipe
    assert recipe.output.resume_from_checkpoint is True


# --- real runs ---


def test_a_loss_above_the_threshold_stops_the_run_and_saves_nothing_over(write_recipe, train, tmp_path):
    recipe = write_recipe(loss_watchdog_threshold=0.5, loss_watchdog_patience=2, max_steps=9, save_steps=1)
    with pytest.raises(TrainingError, match="in 2 steps in a row \\(the last: 2"):
        train(recipe)
    assert steps_saved(tmp_path / "out") == [1]


@pytest.mark.slow
def test_the_result_is_the_best_and_early_stopping_ends_the_run(write_recipe, train, tmp_path, capsys):
    out = tmp_path / "out"
    keys = {"load_best_model_at_end": True, "early_stopping_patience": 3, "save_total_limit": 1}
    recipe = write_recipe(**OVERFITS, **keys)
    rows = [row for row in train(recipe) if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert rows[-1]["step"] < 40 and [row["step"] for row in rows].index(best["step"]) == len(rows) - 4
    assert steps_saved(out) == [best["step"], rows[-1]["step"]], "the best is kept beside the newest"
    kept = load_file(out / "checkpoints" / f"step-{best['step']:08}" / "model.safetensors")
    result = weights_of(out)
    assert all(torch.equal(result[name], kept[name]) for name in kept)
    said = capsys.readouterr().out
    assert f"the result is of step {best['step']}, the best on held-out rows" in said
    train(recipe, "resume_from_checkpoint=true")
    assert "is trained already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_finds_the_same_best_and_stops_at_the_same_step(write_recipe, train, tmp_path):
    keys = {"load_best_model_at_end": True, "early_stopping_patience": 3, "save_total_limit": 0, "adapter": "lora"}
    recipe = write_recipe(**OVERFITS | {"learning_rate": 0.1}, **keys)
    unbroken = train(recipe)
    best = read_saved_state(newest_intact(tmp_path / "out")).state.best_step
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "out" / "checkpoints", broken / "checkpoints")
    for folder in list_checkpoints(broken)[steps_saved(broken).index(best) + 2 :]:
        shutil.rmtree(folder)  # stopped when one evaluation was without gain
    resumed = train(recipe, f"output_dir={broken}", "resume_from_checkpoint=true")
    assert resumed[-1]["step"] == unbroken[-1]["step"] < 40
    left, right = weights_of(tmp_path / "out"), weights_of(broken)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_said_and_not_replaced_by_the_last(write_recipe, train, tmp_path):
    recipe = write_recipe(**OVERFITS, load_best_model_at_end=True, early_stopping_patience=2)
    train(recipe)
    out = tmp_path / "out"
    best = checkpoint = list_checkpoints(out)[0]
    (best / "model.safetensors").write_bytes(b"broken")
    (out / "config.json").unlink()  # killed before the result was written
    with pytest.raises(CheckpointError, match="load_best_model_at_end=false"):
        train(recipe, "resume_from_checkpoint=true")
    assert checkpoint.exists() and not (out / "config.json").exists()


@pytest.mark.parametrize("keys", [{"eval_on_start": True}, {"eval_steps": 1}, {"evals_per_epoch": 2}], ids=str)
def test_evaluation_keys_without_held_out_rows_do_nothing(keys, write_recipe, train):
    """Other tools' templates have them, and they are noted; a mean over no row is none."""
    rows = train(write_recipe(max_steps=2, **keys))
    assert [row["step"] for row in rows] == [1, 2] and not any("eval_loss" in row for row in rows)


def test_best_only_saves_at_the_lowest_losses(write_recipe, train, tmp_path):
    rows = train(write_recipe(**OVERFITS | {"num_epochs": 6}, save_strategy="best", save_total_limit=0))
    lowest, wanted = math.inf, []
    for row in (row for row in rows if "eval_loss" in row):
        if row["eval_loss"] < lowest:
            lowest, wanted = row["eval_loss"], [*wanted, row["step"]]
    assert steps_saved(tmp_path / "out") == wanted


def test_checkpoints_of_the_model_alone_are_small_and_not_gone_on_from(write_recipe, train, tmp_path):
    recipe = write_recipe(save_only_model=True, max_steps=2, save_steps=1, adapter="lora")
    train(recipe)
    folder = list_checkpoints(tmp_path / "out")[0]
    assert not (folder / "optimizer.safetensors").exists() and (folder / "adapter_model.safetensors").exists()
    with pytest.raises(CheckpointError, match="saved with save_only_model"):
        train(recipe, f"resume_from_checkpoint={folder}")


def test_the_first_signal_is_a_request_and_the_second_interrupt_stops():
    said = []
    with stop_requests(said.append) as wish:
        assert not wish
        os.kill(os.getpid(), signal.SIGINT)
        assert wish and wish.signal == signal.SIGINT and "SIGINT: saving" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as it was before"


@pytest.mark.slow
def test_a_batch_systems_signal_to_one_rank_saves_on_all_and_the_run_goes_on_as_if_unbroken(
    write_recipe, train, tmp_path
):
    data = [{"path": str(write_rows(tmp_path / "many.jsonl", alpaca_rows(80))), "type": "alpaca"}]
    recipe = write_recipe(
        datasets=data,
        num_epochs=30,
        micro_batch_size=4,
        adapter="lora",
        save_strategy="no",
        lr_scheduler="constant",
    )
    out = tmp_path / "stopped"
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--tee=3"]
    process = subprocess.Popen(
        [*ranks, "-m", "finetuner.train", recipe, f"output_dir={out}"],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, "it did not begin"
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert "resume with: accelerate launch" in text and "exitcode  : 75" in text, text
    (stopped,) = steps_saved(out)
    assert 3 <= stopped < 300
    steps = f"max_steps={stopped + 2}"
    resume = f"resume_from_checkpoint={out / 'checkpoints' / f'step-{stopped:08}'}"
    done = run_command("finetuner.train", recipe, steps, f"output_dir={out}", resume, ranks=2)
    assert done.code == 0, done.text
    done = run_command("finetuner.train", recipe, steps, f"output_dir={tmp_path / 'unbroken'}", ranks=2)
    assert done.code == 0, done.text
    left, right = weights_of(out), weights_of(tmp_path / "unbroken")
    assert all(torch.equal(left[name], right[name]) for name in left)
