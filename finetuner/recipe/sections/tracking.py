"""Services and files that show a run's figures as curves."""

from typing import Literal

from pydantic import Field

from finetuner.recipe.sections.base import DiskName, Section


class TrackingSection(Section):
    """Where figures go beside metrics.jsonl, by rank 0. Logins are the services' own: `wandb login`, or a variable."""

    use_tensorboard: bool = Field(False, description="Write event files for TensorBoard.")
    logging_dir: DiskName | None = Field(
        None, description="Folder of TensorBoard's files; default: tensorboard in output_dir."
    )
    use_wandb: bool | None = Field(
        None, description="Send the figures to Weights & Biases; default: if wandb_project is given."
    )
    wandb_project: str | None = Field(None, description="Its project.")
    wandb_entity: str | None = Field(None, description="The user or team whose project it is.")
    wandb_name: str | None = Field(None, description="Name of the run there.")
    wandb_run_id: str | None = Field(None, description="Id of the run there; a resumed run goes on under it.")
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="offline: keep the figures in output_dir, for `wandb sync`; disabled: send nothing."
    )
    use_mlflow: bool | None = Field(
        None, description="Send the figures to MLflow; default: if mlflow_tracking_uri or _experiment_name is given."
    )
    mlflow_tracking_uri: str | None = Field(
        None, description="Its server, or a database such as sqlite:///mlflow.db; MLflow refuses a folder of files now."
    )
    mlflow_experiment_name: str | None = Field(None, description="Its experiment.")
    mlflow_run_name: str | None = Field(None, description="Name of the run there.")
    use_trackio: bool | None = Field(
        None, description="Send the figures to Trackio; default: if trackio_project_name or trackio_space_id is given."
    )
    trackio_project_name: str | None = Field(None, description="Its project; default: finetuner.")
    trackio_run_name: str | None = Field(
        None, description="Name of the run there; a resumed run goes on under it. Default: Trackio draws one."
    )
    trackio_space_id: str | None = Field(
        None, description="Space on the hub for the figures, private if it is new; default: a database on this disk."
    )
