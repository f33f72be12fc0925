"""Send the figures of metrics.jsonl to TensorBoard, Weights & Biases, MLflow or Trackio as well, from the main rank.

A tracker that cannot start ends the run before it begins; one that fails later is left out and never ends a run.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetuner.errors import PlanError
from finetuner.recipe.sections import TrackingSection

Figures = Mapping[str, float]
Package = Any  # a tracker's package: none of them is typed well enough to be checked against

MLFLOW_MAX_CHARACTERS = 6000  # of a parameter's value


class Tracker(Protocol):
    """One service or folder that gets a run's figures."""

    name: str

    def log(self, step: int, figures: Figures) -> None: ...

    def close(self, *, well: bool) -> None: ...


@dataclass(frozen=True)
class TrackedRun:
    """Facts that a tracker gets at the start.

    `recipe_values` are shown to everybody who sees the curves, so no secret may be among them. `last_step` is the step
    that a resumed run goes on from, 0 for a new run.
    """

    section: TrackingSection
    output_dir: Path
    recipe_values: Mapping[str, Any]
    last_step: int


class TensorboardTracker:
    name = "TensorBoard"

    def __init__(self, tensorboard: Package, run: TrackedRun) -> None:
        section, last_step = run.section, run.last_step
        folder = Path(section.logging_dir) if section.logging_dir else run.output_dir / "tensorboard"
        # Events of steps after the checkpoint are hidden: a resumed run takes these steps again.
        self.writer = tensorboard.SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else None)

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, *, well: bool) -> None:
        self.writer.close()


class WandbTracker:
    name = "Weights & Biases"

    def __init__(self, wandb: Package, run: TrackedRun) -> None:
        section = run.section
        self.run = wandb.init(
            project=section.wandb_project,
            entity=section.wandb_entity,
            name=section.wandb_name,
            id=section.wandb_run_id,
            mode=section.wandb_mode,
            resume="allow" if section.wandb_run_id else None,
            dir=str(run.output_dir),
            config=dict(run.recipe_values),
        )

    def log(self, step: int, figures: Figures) -> None:
        self.run.log(dict(figures), step=step)

    def close(self, *, well: bool) -> None:
        self.run.finish(exit_code=0 if well else 1)


class MlflowTracker:
    name = "MLflow"

    def __init__(self, mlflow: Package, run: TrackedRun) -> None:
        self.mlflow, section = mlflow, run.section
        if section.mlflow_tracking_uri:
            mlflow.set_tracking_uri(section.mlflow_tracking_uri)
        if section.mlflow_experiment_name:
            mlflow.set_experiment(section.mlflow_experiment_name)
        mlflow.start_run(run_name=section.mlflow_run_name)
        mlflow.log_params({key: str(value)[:MLFLOW_MAX_CHARACTERS] for key, value in run.recipe_values.items()})

    def log(self, step: int, figures: Figures) -> None:
        self.mlflow.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)

    def close(self, *, well: bool) -> None:
        self.mlflow.end_run(status="FINISHED" if well else "FAILED")


class TrackioTracker:
    name = "Trackio"

    def __init__(self, trackio: Package, run: TrackedRun) -> None:
        section = run.section
        self.run = trackio.init(
            project=section.trackio_project_name or "finetuner",
            name=section.trackio_run_name,
            space_id=section.trackio_space_id,
            private=True,  # a new Space would be public, with the recipe's values in it
            resume="allow" if section.trackio_run_name else "never",
            config=dict(run.recipe_values),
            embed=False,
        )

    def log(self, step: int, figures: Figures) -> None:
        self.run.log(dict(figures), step=step)

    def close(self, *, well: bool) -> None:
        self.run.finish()  # how a run ended is nothing that it knows


def wants_wandb(section: TrackingSection) -> bool:
    """Whether the recipe asks for Weights & Biases, by use_wandb or by naming a project."""
    wanted = bool(section.wandb_project) if section.use_wandb is None else section.use_wandb
    return wanted and section.wandb_mode != "disabled"


def wants_mlflow(section: TrackingSection) -> bool:
    """Whether the recipe asks for MLflow, by use_mlflow or by naming a server or an experiment."""
    named = bool(section.mlflow_tracking_uri or section.mlflow_experiment_name)
    return named if section.use_mlflow is None else section.use_mlflow


def wants_trackio(section: TrackingSection) -> bool:
    """Whether the recipe asks for Trackio, by use_trackio or by naming a project or a Space."""
    named = bool(section.trackio_project_name or section.trackio_space_id)
    return named if section.use_trackio is None else section.use_trackio


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker: the recipe key that switches it, the package to install and the module to import for it."""

    switch: str
    package: str
    module: str
    is_wanted: Callable[[TrackingSection], bool]
    start: Callable[[Package, TrackedRun], Tracker]
    hint: str = ""  # what else to write where it cannot start


KINDS = (
    TrackerKind(
        "use_tensorboard", "tensorboard", "torch.utils.tensorboard", lambda s: s.use_tensorboard, TensorboardTracker
    ),
    TrackerKind("use_wandb", "wandb", "wandb", wants_wandb, WandbTracker, hint=", or `wandb_mode: offline`"),
    TrackerKind("use_mlflow", "mlflow", "mlflow", wants_mlflow, MlflowTracker),
    TrackerKind("use_trackio", "trackio", "trackio", wants_trackio, TrackioTracker),
)


def require_trackers(section: TrackingSection) -> None:
    """Raise PlanError for a package that is missing; to be called before anything is loaded."""
    for kind in KINDS:
        if kind.is_wanted(section) and importlib.util.find_spec(kind.package) is None:
            raise PlanError(
                f"the recipe asks for {kind.package}, which is not installed: pip install {kind.package}\n"
                f"Or write `{kind.switch}: false`; metrics.jsonl has every figure."
            )


class Trackers:
    """All trackers that the recipe asks for. One that fails is left out from then on: it never ends a run."""

    def __init__(self, trackers: list[Tracker], say: Callable[[str], None]) -> None:
        self.trackers, self.say = trackers, say

    @classmethod
    def open(
        cls,
        section: TrackingSection,
        output_dir: Path,
        recipe_values: Mapping[str, Any],
        *,
        done: int,
        say: Callable[[str], None],
        load: Callable[[str], Package] = importlib.import_module,
    ) -> "Trackers":
        """Start every tracker that the section asks for, `done` steps into the run; see TrackedRun for the others.

        `load` imports a module by name. Raises PlanError if a tracker cannot start.
        """
        run = TrackedRun(section, output_dir, recipe_values, last_step=done)
        trackers: list[Tracker] = []
        for kind in KINDS:
            if not kind.is_wanted(section):
                continue
            try:
                trackers.append(kind.start(load(kind.module), run))
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise PlanError(
                    f"{kind.switch} cannot start: {reason}\nMend that, or write `{kind.switch}: false`{kind.hint}."
                ) from error
        return cls(trackers, say)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of metrics.jsonl; numbers that are not finite are left out."""
        figures = {
            f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(int(row["step"]), figures))

    def close(self, *, well: bool) -> None:
        """Tell every tracker that the run has ended, and whether it went well."""
        self._each(lambda tracker: tracker.close(well=well))
        self.trackers = []

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"note: {tracker.name} failed and gets no more figures ({type(error).__name__}: {error})")
