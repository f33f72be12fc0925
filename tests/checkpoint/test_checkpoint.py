"""A checkpoint is whole or it is not used; an output folder belongs to one run."""

import json
import multiprocessing
import shutil

import pytest
from safetensors import SafetensorError

from finetuner.checkpoint.compatibility import check_resume, resume_facts
from finetuner.checkpoint.folder import (
    abandon_checkpoints_after,
    checkpoint_folder,
    list_checkpoints,
    newest_intact,
    prune,
    read_saved_state,
    require_intact,
    staged_checkpoint,
)
from finetuner.checkpoint.output_dir import claimed, remove_run_files, require_space
from finetuner.errors import CheckpointError
from finetuner.storage.atomic import move_into
from finetuner.storage.manifest import find_damage
from finetuner.training.loop import TrainState


def saved_run(folder, steps=(1, 2, 3)):
    for step in steps:
        with staged_checkpoint(checkpoint_folder(folder, step), TrainState(step=step), {"recipe": {}}) as to:
            (to / "weights.safetensors").write_bytes(bytes([step % 251]) * 5000)
            (to / "optimizer.safetensors").write_bytes(b"o" * 100)
    return folder


def test_what_is_saved_is_read_back(tmp_path):
    saved_run(tmp_path)
    assert read_saved_state(newest_intact(tmp_path)).state == TrainState(step=3)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["one bit", "cut short", "deleted"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(name, harm, tmp_path):
    path = checkpoint_folder(saved_run(tmp_path), 3) / name
    whole = path.read_bytes()
    if harm == "deleted":
        path.unlink()
    elif harm == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    said = []
    assert newest_intact(tmp_path, said.append) == checkpoint_folder(tmp_path, 2)
    assert len(said) == 1 and "step-00000003 is damaged" in said[0]
    with pytest.raises(CheckpointError, match="is damaged"):
        require_intact(checkpoint_folder(tmp_path, 3))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")], ids=type
)
def test_a_save_that_fails_half_way_leaves_the_one_before_it(tmp_path, error):
    saved_run(tmp_path, steps=(1,))
    with (
        pytest.raises(CheckpointError, match=r"No space left on device \(.* GB are free there\)"),
        staged_checkpoint(checkpoint_folder(tmp_path, 2), TrainState(step=2), {}) as to,
    ):
        (to / "weights.safetensors").write_bytes(b"half")
        raise error
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert find_damage(checkpoint_folder(tmp_path, 1)) is None


def test_a_folder_left_by_a_kill_is_no_checkpoint(tmp_path):
    saved_run(tmp_path, steps=(1,))
    shutil.copytree(checkpoint_folder(tmp_path, 1), tmp_path / "checkpoints" / ".step-00000002.tmp")
    assert newest_intact(tmp_path) == checkpoint_folder(tmp_path, 1)


def test_only_the_newest_are_kept(tmp_path):
    saved_run(tmp_path, steps=(5, 10, 100, 1000))
    prune(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000100", "step-00001000"]
    prune(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 2


def _hold(folder, held, release):
    with claimed(folder, replaces=False):
        held.set()
        release.wait(30)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(60)
    with (
        pytest.raises(CheckpointError, match="another run is writing"),
        claimed(tmp_path, replaces=True),
    ):
        pass
    release.set()
    other.join()
    with claimed(tmp_path, replaces=False):
        assert (tmp_path / ".lock").exists()


def test_an_earlier_run_is_kept_unless_the_recipe_says_otherwise(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="resume_from_checkpoint=true"),
        claimed(tmp_path, replaces=False),
    ):
        pass
    with claimed(tmp_path, replaces=True):
        assert (tmp_path / "metrics.jsonl").exists()


def test_results_move_in_with_the_sign_of_completeness_last(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a", "config.json", "z"):
        (tmp_path / "new" / name).write_text(name)
    (tmp_path / "out" / "config.json").write_text("old")
    move_into(tmp_path / "new", tmp_path / "out", last="config.json")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "config.json", "z"]


def test_a_disk_too_small_is_said_before_the_run(tmp_path):
    require_space(tmp_path, 1000, 3)
    with pytest.raises(CheckpointError, match=r"3 checkpoints of .* GB free"):
        require_space(tmp_path, 10**18, 3)


def facts(**changes):
    recipe = {"base_model": "a", "seed": 1, "learning_rate": 0.1, "logging_steps": 1}
    known = {"num_rows": changes.pop("num_rows", 10), "global_batch": changes.pop("global_batch", 4)}
    known["rows_sha256"] = changes.pop("rows_sha256", "x")
    return json.loads(json.dumps(resume_facts(recipe | changes, **known)))


def test_resume_refuses_another_model_order_or_batch_and_notes_the_rest():
    assert check_resume(facts(), facts()) == []
    assert check_resume(facts(), facts(logging_steps=5)) == []
    assert check_resume(facts(), facts(learning_rate=0.2)) == ["changed since the checkpoint: learning_rate 0.1 -> 0.2"]
    for change in ({"base_model": "b"}, {"seed": 2}, {"num_rows": 11}, {"global_batch": 8}, {"rows_sha256": "y"}):
        with pytest.raises(CheckpointError, match="another run"):
            check_resume(facts(), facts(**change))
    fused, sgd = facts(optimizer="adamw_torch_fused"), facts(optimizer="sgd")
    assert len(check_resume(facts(optimizer="adamw_torch"), fused)) == 1
    with pytest.raises(CheckpointError, match=r"optimizer: adamw_torch -> sgd \(its state would not fit\)"):
        check_resume(fused, sgd)


def test_resume_true_without_a_checkpoint_starts_and_with_a_finished_one_ends(write_recipe, train, capsys):
    recipe = write_recipe(max_steps=2, resume_from_checkpoint=True, adapter="lora")
    first = train(recipe)
    assert "no checkpoint in" in capsys.readouterr().out
    assert train(recipe) == first
    assert "trained already: 2 of 2 steps. Nothing to do." in capsys.readouterr().out


def test_a_run_whose_gradient_stays_nan_stops_and_keeps_its_checkpoints(write_recipe, train, tmp_path):
    from finetuner.errors import TrainingError

    recipe = write_recipe(max_steps=20, save_steps=1, learning_rate=1e30, lr_scheduler="constant", warmup_steps=1)
    with pytest.raises(TrainingError, match="smaller learning_rate"):
        train(recipe)
    whole = newest_intact(tmp_path / "out")
    assert whole is not None and read_saved_state(whole).state.bad_steps == 0
    rows = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "NaN" not in rows and '"loss": null' in rows


def test_only_what_a_run_wrote_is_deleted(tmp_path):
    saved_run(tmp_path)
    mine = ["notes.txt", "model_mine.safetensors", "checkpoints/mine.txt"]
    for name in (*mine, "metrics.jsonl", "recipe.yml", "config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("x")
    (tmp_path / "merged").mkdir()  # without the mark of our merge
    remove_run_files(tmp_path, keep=tmp_path / "recipe.yml")
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert left == sorted([*mine, "recipe.yml", "merged", "checkpoints"])


def test_a_model_that_no_run_wrote_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a model that no run wrote"), claimed(tmp_path, replaces=True):
        pass


def test_a_mistake_in_the_recipe_does_not_cost_the_earlier_run(write_recipe, train, tmp_path):
    from finetuner.errors import DataError

    train(write_recipe(max_steps=1))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    wrong = [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}]
    with pytest.raises(DataError):
        train(write_recipe(max_steps=1, datasets=wrong, overwrite_output_dir=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    rows = train(write_recipe(max_steps=2, overwrite_output_dir=True))
    assert [row["step"] for row in rows] == [1, 2]


def test_a_run_that_is_extended_and_stopped_is_not_taken_for_done(write_recipe, train, tmp_path, monkeypatch):
    from finetuner.run import output as run_module

    out = tmp_path / "out"
    recipe = write_recipe(adapter="lora", save_steps=1, resume_from_checkpoint=True, lr_scheduler="constant")
    train(recipe, "max_steps=2")
    short = (out / "adapter_model.safetensors").read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_result", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, "max_steps=4")
    assert not (out / "adapter_config.json").exists(), "the old result does not pass for the new one"
    train(recipe, "max_steps=4")
    assert (out / "adapter_config.json").exists()
    assert (out / "adapter_model.safetensors").read_bytes() != short


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(write_recipe, train, tmp_path):
    recipe = write_recipe(adapter="lora", max_steps=4, save_steps=1, save_total_limit=0)
    train(recipe)
    older = checkpoint_folder(tmp_path / "out", 2)
    train(recipe, f"resume_from_checkpoint={older}", "max_steps=3")
    names = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == [
        "abandoned-step-00000003", "abandoned-step-00000004", "step-00000001", "step-00000002", "step-00000003",
    ]  # fmt: skip
    assert abandon_checkpoints_after(tmp_path / "out", 3) == []


def test_data_that_changed_under_a_checkpoint_is_refused_even_with_as_many_rows(write_recipe, train, rows_file):
    recipe = write_recipe(adapter="lora", max_steps=2, save_steps=1, resume_from_checkpoint=True)
    train(recipe)
    rows_file.write_text(rows_file.read_text().replace("a b c", "c b a"))
    with pytest.raises(CheckpointError, match="the tokens of the training rows"):
        train(recipe, "max_steps=3")


def test_a_folder_that_is_no_checkpoint_is_called_that(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        require_intact(tmp_path)
