"""What a run tells TensorBoard, Weights & Biases, MLflow and Trackio, read back from what these packages wrote.

The packages are the real ones, without a network: Weights & Biases offline, MLflow and Trackio on local databases. A
test of one that is not installed is skipped. None of them can end a run.
"""

import contextlib
import importlib.util
import json
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.results import unfinished

from finetuner.errors import PlanError
from finetuner.recipe import load
from finetuner.recipe.sections import TrackingSection
from finetuner.training.trackers import Figures, Trackers, require_trackers, wants_mlflow, wants_trackio, wants_wandb

FIGURES = {"step": 3, "loss": 2.5, "eval_loss": 2.0, "grad_norm": float("nan"), "learning_rate": 0.1}
WRITTEN = {"train/loss": 2.5, "eval/loss": 2.0, "train/learning_rate": 0.1}  # of FIGURES


def installed(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_wandb = installed("wandb")
needs_mlflow = installed("mlflow", "sqlalchemy", "alembic")
needs_trackio = installed("trackio")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages send no reports of their own."""
    for name, value in {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "DO_NOT_TRACK": "true"}.items():
        monkeypatch.setenv(name, value)


def opened(tmp_path: Path, said: list[str], values: Mapping[str, Any] | None = None, **keys: Any) -> Trackers:
    values = {"learning_rate": 0.1} if values is None else values
    return Trackers.open(TrackingSection(**keys), tmp_path, values, done=0, say=said.append)


def wandb_records(folder: Path) -> list[Any]:
    """Every record of the one offline run in `folder`, which has ended: its file is complete a moment later."""
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while True:
        records = records_in(path)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, "the run has ended, and its file does not say so"
        time.sleep(0.05)


def records_in(path: Path) -> list[Any]:
    """Every whole record of a file that may be being written: a log of LevelDB's form behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left_of_block = 32768 - at % 32768
        if left_of_block < 7:  # too small for a header: filled up
            at += left_of_block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(message))
            message = b""
    return records


def wandb_steps(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for record in wandb_records(folder):
        if record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            yield record.history.step.num, {name: value for name, value in items.items() if name[0] != "_"}


@pytest.fixture(scope="module", autouse=True)
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Trackio has its databases. It asks once, when it is imported, so that all tests share one folder."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


def trackio_rows(folder: Path, project: str) -> list[tuple[str, int, dict[str, float]]]:
    """(run, step, figures) of every row of a project, in the order in which they were logged."""
    with contextlib.closing(sqlite3.connect(folder / f"{project}.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(run, step, json.loads(metrics)) for run, step, metrics in rows]


def mlflow_run(database: Path, experiment: str) -> tuple[Any, Any]:
    """The client, and the one run of the experiment."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return client, run


@needs_wandb
def test_wandb_has_the_names_the_recipe_every_finite_figure_and_how_the_run_ended(tmp_path):
    names = {"wandb_project": "p", "wandb_entity": "e", "wandb_name": "n", "wandb_run_id": "i"}
    trackers = opened(tmp_path, [], wandb_mode="offline", **names)
    trackers.log(FIGURES)
    trackers.close(well=False)
    records = wandb_records(tmp_path)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.entity, run.display_name, run.run_id) == ("p", "e", "n", "i")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["learning_rate"] == 0.1
    assert list(wandb_steps(tmp_path)) == [(3, WRITTEN)]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


@needs_mlflow
@pytest.mark.parametrize("well, status", [(True, "FINISHED"), (False, "FAILED")])
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow_has_the_names_the_recipe_every_finite_figure_and_how_the_run_ended(tmp_path, well, status):
    database = tmp_path / "mlflow.db"
    values = {"learning_rate": 0.1, "long": "x" * 7000} | {f"key_{i}": i for i in range(300)}
    names = {"mlflow_tracking_uri": f"sqlite:///{database}", "mlflow_experiment_name": "x", "mlflow_run_name": "r"}
    trackers = opened(tmp_path, [], values, **names)
    trackers.log(FIGURES)
    trackers.close(well=well)
    client, run = mlflow_run(database, "x")
    assert (run.info.run_name, run.info.status) == ("r", status)
    assert run.data.params == {key: str(value)[:6000] for key, value in values.items()}
    assert run.data.metrics == {name.replace("/", "."): value for name, value in WRITTEN.items()}
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train.loss")] == [3]


@needs_trackio
def test_trackio_has_the_names_the_recipe_and_every_finite_figure_and_a_resumed_run_goes_on(tmp_path, trackio_folder):
    names = {"trackio_project_name": "names", "trackio_run_name": "n"}
    for step in (3, 4):
        trackers = opened(tmp_path, [], **names)
        trackers.log(FIGURES | {"step": step})
        trackers.close(well=True)
    assert trackio_rows(trackio_folder, "names") == [("n", 3, WRITTEN), ("n", 4, WRITTEN)]
    with contextlib.closing(sqlite3.connect(trackio_folder / "names.db")) as database:
        ((config,),) = database.execute("select config from configs").fetchall()
    assert json.loads(config)["learning_rate"] == 0.1


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
@pytest.mark.parametrize(
    "tracker",
    [
        pytest.param("wandb", marks=needs_wandb),
        pytest.param("mlflow", marks=needs_mlflow),
        pytest.param("trackio", marks=needs_trackio),
    ],
)
def test_a_tracker_has_the_figures_of_a_runs_metrics(write_recipe, train, tmp_path, trackio_folder, tracker):
    keys: dict[str, dict[str, object]] = {
        "wandb": {"wandb_project": "p", "wandb_mode": "offline"},
        "mlflow": {"mlflow_tracking_uri": f"sqlite:///{tmp_path / 'm.db'}", "mlflow_experiment_name": "x"},
        "trackio": {"trackio_project_name": "figures"},
    }
    rows = train(write_recipe(adapter="lora", max_steps=4, val_set_size=2, eval_steps=2, **keys[tracker]))
    for name, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/grad_norm", "grad_norm")):
        expected = [(row["step"], row[key]) for row in rows if key in row]
        if tracker == "wandb":
            found = [(step, items[name]) for step, items in wandb_steps(tmp_path / "out") if name in items]
        elif tracker == "trackio":
            logged = trackio_rows(trackio_folder, "figures")
            found = [(step, items[name]) for _, step, items in logged if name in items]
        else:
            client, run = mlflow_run(tmp_path / "m.db", "x")
            history = client.get_metric_history(run.info.run_id, name.replace("/", "."))
            found = [(point.step, point.value) for point in history]
        assert found == expected


class FailingTracker:
    name = "Away"

    def log(self, step: int, figures: Figures) -> None:
        raise ConnectionError("the service is away")

    def close(self, *, well: bool) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_and_said_once():
    said: list[str] = []
    trackers = Trackers([FailingTracker()], said.append)
    trackers.log(FIGURES)
    trackers.log(FIGURES)
    trackers.close(well=True)
    assert said == ["note: Away failed and gets no more figures (ConnectionError: the service is away)"]


def test_a_tracker_that_cannot_start_says_why_and_what_to_write(tmp_path):
    def load(module: str) -> Any:
        raise ConnectionError("the service is away\nand more")

    message = r"use_wandb cannot start: the service is away\n.*`use_wandb: false`, or `wandb_mode: offline`\.$"
    with pytest.raises(PlanError, match=message):
        Trackers.open(TrackingSection(use_wandb=True), tmp_path, {}, done=0, say=lambda _: None, load=load)


@needs_wandb
def test_wandb_without_a_login_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(PlanError, match="use_wandb cannot start: "):
        opened(tmp_path, [], use_wandb=True, wandb_mode="online")


@needs_mlflow
def test_mlflow_names_a_database_where_a_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(PlanError, match=r"use_mlflow cannot start: .*sqlite:///mlflow\.db"):
        opened(tmp_path, [], mlflow_tracking_uri=str(tmp_path / "runs"), mlflow_experiment_name="x")


@pytest.mark.parametrize(
    "package, key",
    [("mlflow", "mlflow_experiment_name"), ("wandb", "wandb_project"), ("trackio", "trackio_project_name")],
)
def test_a_package_that_is_missing_is_said_before_anything_is_loaded(
    write_recipe, train, tmp_path, monkeypatch, package, key
):
    require_trackers(TrackingSection(use_tensorboard=True))
    monkeypatch.setitem(sys.modules, package, None)  # by which Python knows a module that cannot be imported
    with pytest.raises(PlanError, match=f"asks for {package}, which is not installed: pip install {package}"):
        train(write_recipe(**{key: "x"}))
    assert not (tmp_path / "prepared").exists()


def test_keys_that_name_a_tracker_ask_for_it_and_can_switch_it_off():
    assert wants_wandb(TrackingSection(wandb_project="p")) and not wants_wandb(TrackingSection())
    assert not wants_wandb(TrackingSection(wandb_project=""))
    assert not wants_wandb(TrackingSection(wandb_project="p", use_wandb=False))
    assert not wants_wandb(TrackingSection(wandb_project="p", wandb_mode="disabled"))
    assert wants_mlflow(TrackingSection(mlflow_tracking_uri="u"))
    assert not wants_mlflow(TrackingSection(mlflow_tracking_uri="u", use_mlflow=False))
    assert wants_trackio(TrackingSection(trackio_space_id="me/curves")) and not wants_trackio(TrackingSection())
    assert not wants_trackio(TrackingSection(trackio_project_name="p", use_trackio=False))


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
