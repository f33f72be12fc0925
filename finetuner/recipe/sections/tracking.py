"""Services and files that show a run's figures as curves."""

from typing import Annotated, Literal

from pydantic import Field

from finetuner.recipe.sections.base import DiskName, Section
from finetuner.recipe.sections.facts import FREE, ONLY_HERE, KeyFacts


class TrackingSection(Section):
    """Trackers that rank 0 sends figures to, besides metrics.jsonl. Logins are the services' own (`wandb login`)."""

    use_tensorboard: Annotated[bool, FREE] = Field(False, description="Write event files for TensorBoard.")
    logging_dir: Annotated[DiskName | None, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        None, description="Folder of TensorBoard's files; default: tensorboard in output_dir."
    )
    use_wandb: Annotated[bool | None, FREE] = Field(
        None, description="Send the figures to Weights & Biases; default: if wandb_project is given."
    )
    wandb_project: Annotated[str | None, FREE] = Field(None, description="Its project.")
    wandb_entity: Annotated[str | None, FREE] = Field(None, description="The user or team whose project it is.")
    wandb_name: Annotated[str | None, FREE] = Field(None, description="Name of the run there.")
    wandb_run_id: Annotated[str | None, FREE] = Field(
        None, description="Id of the run there; a resumed run goes on under it."
    )
    wandb_mode: Annotated[Literal["online", "offline", "disabled"] | None, FREE] = Field(
        None, description="offline: keep the figures in output_dir, for `wandb sync`; disabled: send nothing."
    )
    use_mlflow: Annotated[bool | None, FREE] = Field(
        None, description="Send the figures to MLflow; default: if mlflow_tracking_uri or _experiment_name is given."
    )
    mlflow_tracking_uri: Annotated[str | None, FREE] = Field(
        None, description="Its server, or a database such as sqlite:///mlflow.db; MLflow refuses a folder of files now."
    )
    mlflow_experiment_name: Annotated[str | None, FREE] = Field(None, description="Its experiment.")
    mlflow_run_name: Annotated[str | None, FREE] = Field(None, description="Name of the run there.")
    use_trackio: Annotated[bool | None, FREE] = Field(
        None, description="Send the figures to Trackio; default: if trackio_project_name or trackio_space_id is given."
    )
    trackio_project_name: Annotated[str | None, FREE] = Field(None, description="Its project; default: finetuner.")
    trackio_run_name: Annotated[str | None, FREE] = Field(
        None, description="Name of the run there; a resumed run goes on under it. Default: Trackio draws one."
    )
    trackio_space_id: Annotated[str | None, FREE] = Field(
        None, description="Space on the hub for the figures, private if it is new; default: a database on this disk."
    )
