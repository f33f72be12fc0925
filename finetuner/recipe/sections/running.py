"""Evaluation, files and logs."""

from pydantic import Field

from finetuner.recipe.sections.base import Count, CountOrZero, DiskName, Section, Steps


class EvaluationSection(Section):
    """When the held-out loss is taken; always after the last step if there are held-out rows."""

    eval_steps: Steps | None = Field(None, description="Every so many steps.")
    evals_per_epoch: Count | None = Field(None, description="So many times an epoch; default: once.")
    eval_on_start: bool = Field(False, description="Also before the first step.")


class OutputSection(Section):
    """Where everything goes, how often it is saved and logged, and where a run goes on from."""

    output_dir: DiskName = Field("outputs/run", min_length=1, description="Folder for all that the run writes.")
    overwrite_output_dir: bool = Field(False, description="Delete what an earlier run wrote there, and start anew.")
    save_steps: Steps | None = Field(None, description="A checkpoint every so many steps.")
    saves_per_epoch: Count | None = Field(None, description="So many checkpoints an epoch; default: one.")
    save_total_limit: CountOrZero = Field(3, description="Checkpoints kept; the oldest go first. 0: keep all.")
    resume_from_checkpoint: bool | DiskName = Field(
        False, description="true: the newest whole checkpoint in output_dir, if there is one; or a checkpoint's folder."
    )
    logging_steps: Steps = Field(1, description="A line in metrics.jsonl every so many steps.")
    seed: CountOrZero = Field(42, description="Order of the rows, dropout, new weights.")
