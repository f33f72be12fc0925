"""Evaluation, files and logs."""

from typing import Literal

from pydantic import Field

from finetuner.recipe.sections.base import Count, CountOrZero, DiskName, Positive, Section, Steps


class EvaluationSection(Section):
    """When the held-out loss is taken; always after the last step if there are held-out rows."""

    eval_steps: Steps | None = Field(None, description="Every so many steps.")
    evals_per_epoch: Count | None = Field(None, description="So many times an epoch; default: once.")
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None, description="no: never; epoch: at each epoch's end; steps: as eval_steps or evals_per_epoch says."
    )
    eval_on_start: bool = Field(False, description="Also before the first step.")
    generate_samples: Steps | None = Field(
        None, description="Show a text by the model every so many steps; on one rank or under DDP."
    )
    generate_prompt: str = Field("", description="How those texts begin; default: as a new document.")


class OutputSection(Section):
    """Where everything goes, how often it is saved and logged, and where a run goes on from."""

    output_dir: DiskName = Field("outputs/run", min_length=1, description="Folder for all that the run writes.")
    overwrite_output_dir: bool = Field(False, description="Delete what an earlier run wrote there, and start anew.")
    save_steps: Steps | None = Field(None, description="A checkpoint every so many steps.")
    saves_per_epoch: Count | None = Field(None, description="So many checkpoints an epoch; default: one.")
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = Field(
        None,
        description="no: only when the run is asked to stop; epoch: at each epoch's end; steps: as save_steps or "
        "saves_per_epoch says; best: at each evaluation with the lowest held-out loss so far.",
    )
    save_first_step: bool = Field(False, description="Also after the first step, to see that saving works.")
    save_only_model: bool = Field(
        False, description="Checkpoints without the optimizer's state: smaller, and no run can go on from them."
    )
    save_total_limit: CountOrZero = Field(
        3, description="Checkpoints kept; the oldest go first, but not the best if it is wanted. 0: keep all."
    )
    resume_from_checkpoint: bool | DiskName = Field(
        False, description="true: the newest whole checkpoint in output_dir, if there is one; or a checkpoint's folder."
    )
    hub_model_id: str | None = Field(
        None, min_length=1, description="Repository on the hub that the result is uploaded to, such as you/my-model."
    )
    hub_strategy: Literal["end"] = Field("end", description="The upload is of the result, when the run is done.")
    hub_private_repo: bool = Field(True, description="Whether a repository that is made for it is private.")
    logging_steps: Steps = Field(1, description="A line in metrics.jsonl every so many steps.")
    device_peak_flops: Positive | None = Field(
        None,
        description="FLOPs a second of one device in the number format it computes in, such as 312e12, which `mfu` in "
        "metrics.jsonl is a share of; default: by the data sheets of known GPUs in bf16 or fp16, else no `mfu`.",
    )
    seed: CountOrZero = Field(42, description="Order of the rows, dropout, new weights.")
