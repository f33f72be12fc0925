"""Rules about trackers: the keys of one that is not used are mistakes."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values


def _what_is_named_is_used(values: Values) -> Iterator[Finding]:
    if values["logging_dir"] is not None and not values["use_tensorboard"]:
        yield Finding(("logging_dir",), "logging_dir has no effect without `use_tensorboard: true`. Add that.")
    for key in ("wandb_entity", "wandb_name", "wandb_run_id"):
        if values[key] and not values["wandb_project"] and values["use_wandb"] is None:
            yield Finding((key,), f"{key} has no effect without wandb_project. Add that, or remove this line.")
            break
    if values["mlflow_run_name"] and values["use_mlflow"] is None:
        if values["mlflow_tracking_uri"] or values["mlflow_experiment_name"]:
            return
        yield Finding(("mlflow_run_name",), "mlflow_run_name has no effect without `use_mlflow: true`. Add that.")


def _trackio_is_used(values: Values) -> Iterator[Finding]:
    named = values["trackio_project_name"] or values["trackio_space_id"]
    if values["trackio_run_name"] and values["use_trackio"] is None and not named:
        yield Finding(("trackio_run_name",), "trackio_run_name has no effect without `use_trackio: true`. Add that.")


RULES: tuple[Rule, ...] = (
    (
        (
            "use_tensorboard", "logging_dir", "use_wandb", "wandb_project", "wandb_entity", "wandb_name",
            "wandb_run_id", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name",
        ),
        _what_is_named_is_used,
    ),
    (("use_trackio", "trackio_project_name", "trackio_run_name", "trackio_space_id"), _trackio_is_used),
)  # fmt: skip
