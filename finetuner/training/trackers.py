"""The figures of metrics.jsonl, sent to TensorBoard, Weights & Biases or MLflow as well, by the main rank."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from finetuner.errors import PlanError
from finetuner.recipe.sections import TrackingSection

Figures = Mapping[str, float]


class Tracker(Protocol):
    name: str

    def log(self, step: int, figures: Figures) -> None: ...

    def close(self, *, well: bool) -> None: ...


class TensorboardTracker:
    name = "TensorBoard"

    def __init__(self, folder: Path, *, done: int) -> None:
        """Events of steps after `done`, which a resumed run takes anew, are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, *, well: bool) -> None:
        self.writer.close()


class WandbTracker:
    name = "Weights & Biases"

    def __init__(
        self, wandb: Any, section: TrackingSection, output_dir: Path, recipe_values: Mapping[str, Any]
    ) -> None:
        self.run = wandb.init(
            project=section.wandb_project,
            entity=section.wandb_entity,
            name=section.wandb_name,
            id=section.wandb_run_id,
            mode=section.wandb_mode,
            resume="allow" if section.wandb_run_id else None,
            dir=str(output_dir),
            config=dict(recipe_values),
        )

    def log(self, step: int, figures: Figures) -> None:
        self.run.log(dict(figures), step=step)

    def close(self, *, well: bool) -> None:
        self.run.finish(exit_code=0 if well else 1)


class MlflowTracker:
    name = "MLflow"

    def __init__(self, mlflow: Any, section: TrackingSection, recipe_values: Mapping[str, Any]) -> None:
        self.mlflow = mlflow
        if section.mlflow_tracking_uri:
            mlflow.set_tracking_uri(section.mlflow_tracking_uri)
        if section.mlflow_experiment_name:
            mlflow.set_experiment(section.mlflow_experiment_name)
        mlflow.start_run(run_name=section.mlflow_run_name)
        # a parameter there has at most 6,000 characters
        mlflow.log_params({key: str(value)[:6000] for key, value in recipe_values.items()})

    def log(self, step: int, figures: Figures) -> None:
        self.mlflow.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)

    def close(self, *, well: bool) -> None:
        self.mlflow.end_run(status="FINISHED" if well else "FAILED")


def wants_wandb(section: TrackingSection) -> bool:
    wanted = bool(section.wandb_project) if section.use_wandb is None else section.use_wandb
    return wanted and section.wandb_mode != "disabled"


def wants_mlflow(section: TrackingSection) -> bool:
    named = bool(section.mlflow_tracking_uri or section.mlflow_experiment_name)
    return named if section.use_mlflow is None else section.use_mlflow


def require_trackers(section: TrackingSection) -> None:
    """Raises PlanError for a package that is missing; to be asked before anything is loaded."""
    wanted = {
        "tensorboard": section.use_tensorboard,
        "wandb": wants_wandb(section),
        "mlflow": wants_mlflow(section),
    }
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise PlanError(
                f"the recipe asks for {package}, which is not installed: pip install {package}\n"
                f"Or write `use_{package}: false`; metrics.jsonl has every figure."
            )


class Trackers:
    """All that the recipe asks for. One that fails is left out from then on: it never ends a run."""

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
        load: Callable[[str], Any] = importlib.import_module,
    ) -> "Trackers":
        """`recipe_values` are shown there, so no secret may be among them; `done` steps are behind. `load` gives the
        package of a name. Raises PlanError if one cannot start."""
        makers: dict[str, Callable[[], Tracker]] = {}
        if section.use_tensorboard:
            folder = Path(section.logging_dir) if section.logging_dir else output_dir / "tensorboard"
            makers["use_tensorboard"] = lambda: TensorboardTracker(folder, done=done)
        if wants_wandb(section):
            makers["use_wandb"] = lambda: WandbTracker(load("wandb"), section, output_dir, recipe_values)
        if wants_mlflow(section):
            makers["use_mlflow"] = lambda: MlflowTracker(load("mlflow"), section, recipe_values)
        trackers: list[Tracker] = []
        for key, make in makers.items():
            try:
                trackers.append(make())
            except Exception as error:
                hint = ", or `wandb_mode: offline`" if key == "use_wandb" else ""
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise PlanError(f"{key} cannot start: {first}\nMend that, or write `{key}: false`{hint}.") from error
        return cls(trackers, say)

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl; numbers that are not finite are left out."""
        figures = {
            f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(int(row["step"]), figures))

    def close(self, *, well: bool) -> None:
        self._each(lambda tracker: tracker.close(well=well))
        self.trackers = []

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"note: {tracker.name} failed and gets no more figures ({type(error).__name__}: {error})")
