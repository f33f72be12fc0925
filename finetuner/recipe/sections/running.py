"""Evaluation, files and logs."""

from typing import Annotated, Literal

from pydantic import Field

from finetuner.recipe.sections.base import Count, CountOrZero, DiskName, Positive, Section, Steps, StepsOrPart
from finetuner.recipe.sections.facts import FREE, NOTED, ONLY_HERE, KeyFacts


class EvaluationSection(Section):
    """Times at which the held-out loss is taken; if there are held-out rows, always after the last step."""

    eval_steps: Annotated[StepsOrPart | None, FREE] = Field(
        None, description="Every so many steps; below 1: every such part of all steps, rounded up."
    )
    evals_per_epoch: Annotated[Count | None, FREE] = Field(None, description="So many times an epoch; default: once.")
    eval_strategy: Annotated[
        Literal["no", "steps", "epoch"] | None, KeyFacts(resume="free", aliases=("evaluation_strategy",))
    ] = Field(None, description="no: never; epoch: at each epoch's end; steps: as eval_steps or evals_per_epoch says.")
    eval_on_start: Annotated[bool, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        False, description="Also before the first step."
    )
    generate_samples: Annotated[
        Steps | None, KeyFacts(resume="free", axolotl="there true or false, and with each evaluation")
    ] = Field(None, description="Show a text by the model every so many steps; on one rank or under DDP.")
    generate_prompt: Annotated[str, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        "", description="How those texts begin; default: as a new document."
    )


class OutputSection(Section):
    """Folder and upload of the results, how often they are saved and logged, and the checkpoint to go on from."""

    output_dir: Annotated[DiskName, FREE] = Field(
        "outputs/run", min_length=1, description="Folder for all that the run writes."
    )
    overwrite_output_dir: Annotated[bool, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        False, description="Delete what an earlier run wrote there, and start from the beginning."
    )
    save_steps: Annotated[StepsOrPart | None, FREE] = Field(
        None, description="A checkpoint every so many steps; below 1: every such part of all steps, rounded up."
    )
    saves_per_epoch: Annotated[Count | None, FREE] = Field(
        None, description="So many checkpoints an epoch; default: one."
    )
    save_strategy: Annotated[Literal["no", "steps", "epoch", "best"] | None, FREE] = Field(
        None,
        description="no: only when the run is asked to stop; epoch: at each epoch's end; steps: as save_steps or "
        "saves_per_epoch says; best: at each evaluation with the lowest held-out loss so far.",
    )
    save_first_step: Annotated[bool, FREE] = Field(
        False, description="Also after the first step, to see that saving works."
    )
    save_only_model: Annotated[bool, FREE] = Field(
        False, description="Checkpoints without the optimizer's state: smaller, and no run can go on from them."
    )
    save_total_limit: Annotated[CountOrZero, KeyFacts(resume="free", axolotl="there no limit by default; here 3")] = (
        Field(3, description="Checkpoints kept; the oldest go first, but not the best if it is wanted. 0: keep all.")
    )
    resume_from_checkpoint: Annotated[
        bool | DiskName, KeyFacts(resume="free", axolotl="there a path only; here also true for the newest one")
    ] = Field(
        False,
        description="true: the newest complete checkpoint in output_dir, if any; or a checkpoint's folder.",
    )
    hub_model_id: Annotated[str | None, FREE] = Field(
        None, min_length=1, description="Repository on the hub that the result is uploaded to, such as you/my-model."
    )
    hub_strategy: Annotated[Literal["end", "every_save"], FREE] = Field(
        "end",
        description="end: the result, when the run is done; every_save: also the weights of each checkpoint, beside "
        "the training, which a failing network does not stop.",
    )
    hub_private_repo: Annotated[bool, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        True, description="Whether a repository that is made for it is private."
    )
    logging_steps: Annotated[
        StepsOrPart, KeyFacts(resume="free", axolotl="there 500 by default in some versions; here 1")
    ] = Field(1, description="A line in metrics.jsonl every so many steps, or every part of all steps.")
    device_peak_flops: Annotated[Positive | None, NOTED] = Field(
        None,
        description="FLOPs a second of one device in the number format it computes in, such as 312e12, which `mfu` in "
        "metrics.jsonl is a share of; default: by the data sheets of known GPUs in bf16 or fp16, else no `mfu`.",
    )
    seed: Annotated[
        CountOrZero, KeyFacts(resume="must_match", axolotl="there not set by default in some versions; here 42")
    ] = Field(42, description="Order of the rows, dropout, new weights.")
