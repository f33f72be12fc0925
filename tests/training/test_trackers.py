"""What a run tells TensorBoard, Weights & Biases and MLflow, and that none of them can end it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support.results import unfinished

from finetuner.errors import PlanError
from finetuner.recipe import load
from finetuner.recipe.sections import TrackingSection
from finetuner.training.trackers import Trackers, require_trackers, wants_mlflow, wants_wandb

FIGURES = {"step": 3, "loss": 2.5, "eval_loss": 2.0, "grad_norm": float("nan"), "learning_rate": 0.1}


class Recorder:
    """Stands in for a tracker's package: every call is written down, with what it was given."""

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.fails_at = fails_at

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> "Recorder":
            if name == self.fails_at:
                raise ConnectionError("the service is away")
            self.calls.append((name, arguments, named))
            return self

        return call


def opened(recorder: Recorder, tmp_path: Path, said: list[str], **keys: Any) -> Trackers:
    section = TrackingSection(**keys)
    return Trackers.open(
        section, tmp_path, {"learning_rate": 0.1}, done=0, say=said.append, load=lambda package: recorder
    )


def test_wandb_is_handed_the_names_the_recipe_and_every_finite_figure(tmp_path):
    recorder = Recorder()
    names = {"wandb_project": "p", "wandb_entity": "e", "wandb_name": "n", "wandb_run_id": "i"}
    trackers = opened(recorder, tmp_path, [], wandb_mode="offline", **names)
    trackers.log(FIGURES)
    trackers.close(well=False)
    (_, _, start), log, end = recorder.calls
    assert start == {
        "project": "p", "entity": "e", "name": "n", "id": "i", "mode": "offline", "resume": "allow",
        "dir": str(tmp_path), "config": {"learning_rate": 0.1},
    }  # fmt: skip
    assert log == ("log", ({"train/loss": 2.5, "eval/loss": 2.0, "train/learning_rate": 0.1},), {"step": 3})
    assert end == ("finish", (), {"exit_code": 1})


def test_mlflow_is_handed_server_experiment_parameters_and_figures(tmp_path):
    recorder = Recorder()
    trackers = opened(recorder, tmp_path, [], mlflow_tracking_uri="u", mlflow_experiment_name="x", mlflow_run_name="r")
    trackers.log(FIGURES)
    trackers.close(well=True)
    assert recorder.calls == [
        ("set_tracking_uri", ("u",), {}),
        ("set_experiment", ("x",), {}),
        ("start_run", (), {"run_name": "r"}),
        ("log_params", ({"learning_rate": "0.1"},), {}),
        ("log_metrics", ({"train.loss": 2.5, "eval.loss": 2.0, "train.learning_rate": 0.1},), {"step": 3}),
        ("end_run", (), {"status": "FINISHED"}),
    ]


def test_a_tracker_that_fails_is_left_out_and_said_once(tmp_path):
    said: list[str] = []
    trackers = opened(Recorder(fails_at="log"), tmp_path, said, use_wandb=True)
    trackers.log(FIGURES)
    trackers.log(FIGURES)
    trackers.close(well=True)
    assert said == ["note: Weights & Biases failed and gets no more figures (ConnectionError: the service is away)"]
    with pytest.raises(PlanError, match="use_wandb cannot start: the service is away"):
        opened(Recorder(fails_at="init"), tmp_path, said, use_wandb=True)


def test_a_package_that_is_missing_is_said_before_anything_is_loaded(write_recipe, train, tmp_path):
    require_trackers(TrackingSection(use_tensorboard=True))
    if importlib.util.find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed")
    with pytest.raises(PlanError, match="asks for mlflow, which is not installed: pip install mlflow"):
        train(write_recipe(mlflow_experiment_name="x"))
    assert not (tmp_path / "prepared").exists()


def test_keys_that_name_a_tracker_ask_for_it_and_can_switch_it_off():
    assert wants_wandb(TrackingSection(wandb_project="p")) and not wants_wandb(TrackingSection())
    assert not wants_wandb(TrackingSection(wandb_project=""))
    assert not wants_wandb(TrackingSection(wandb_project="p", use_wandb=False))
    assert not wants_wandb(TrackingSection(wandb_project="p", wandb_mode="disabled"))
    assert wants_mlflow(TrackingSection(mlflow_tracking_uri="u"))
    assert not wants_mlflow(TrackingSection(mlflow_tracking_uri="u", use_mlflow=False))


def test_boilerplate_of_trackers_asks_for_nothing(write_recipe):
    loaded = load(write_recipe(wandb_project="", wandb_watch="", wandb_log_model="", use_tensorboard=False))
    assert not wants_wandb(loaded.recipe.tracking)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_the_figures_of_a_run_and_of_its_resumption(write_recipe, train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(folder: Path, name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(folder))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    recipe = write_recipe(adapter="lora", max_steps=4, save_steps=2, val_set_size=2, use_tensorboard=True)
    rows = train(recipe, f"output_dir={tmp_path / 'a'}")
    losses = [(row["step"], pytest.approx(row["loss"])) for row in rows if "loss" in row]
    held_out = [(row["step"], pytest.approx(row["eval_loss"])) for row in rows if "eval_loss" in row]
    assert curve(tmp_path / "a" / "tensorboard", "train/loss") == losses
    assert curve(tmp_path / "a" / "tensorboard", "eval/loss") == held_out
    half = unfinished(tmp_path / "a", tmp_path / "b", 2)
    train(recipe, f"output_dir={half}", "resume_from_checkpoint=true", f"logging_dir={tmp_path / 'tb'}")
    assert [step for step, _ in curve(tmp_path / "tb", "train/loss")] == [3, 4]

    train(recipe, f"output_dir={tmp_path / 'a'}", "overwrite_output_dir=true", "max_steps=3")
    assert len(curve(tmp_path / "a" / "tensorboard", "train/loss")) == 3, "the earlier run's curve is gone"
