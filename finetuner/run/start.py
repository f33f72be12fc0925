"""The start of a run, on which all ranks agree: the rows, the schedule, and the checkpoint to go on from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from finetuner.checkpoint.compatibility import check_resume, resume_facts
from finetuner.checkpoint.folder import list_checkpoints, newest_intact, read_saved_state, require_intact
from finetuner.console import Screen
from finetuner.data.cache import tokenizer_digest
from finetuner.errors import CheckpointError, DataError
from finetuner.parallel.launch import build_accelerator, by_main_rank
from finetuner.plan.schedule import Schedule
from finetuner.recipe import flat_values
from finetuner.recipe.sections import OutputSection
from finetuner.run.inputs import Inputs
from finetuner.run.session import Session
from finetuner.training.state import TrainState


@dataclass(frozen=True)
class Start:
    """The beginning of a run. `facts`: recorded in checkpoints, to be compared on resume; `checkpoint`: the one it
    goes on from."""

    accelerator: Accelerator
    schedule: Schedule
    facts: dict[str, Any]
    checkpoint: Path | None
    state: TrainState

    @property
    def is_last_step_done(self) -> bool:
        return self.state.stopped_early or self.state.step >= self.schedule.total_steps


def join_ranks(session: Session, inputs: Inputs) -> Start:
    """Let the ranks meet and agree on rows and checkpoint. Called by all of them together.

    Raises PlanError if they cannot meet, DataError for other rows on another node, and CheckpointError for a checkpoint
    that this run cannot go on from.
    """
    recipe, plan, prepared = session.recipe, session.plan, inputs.prepared
    schedule = plan.schedule(recipe, len(prepared.train_rows), prepared.train.num_tokens)
    accelerator = build_accelerator(plan, session.world, recipe.sharding.ddp_timeout)
    require_same_rows(accelerator, prepared.train_rows.sha256)
    sha256 = tokenizer_digest(inputs.vocabulary.tokenizer) if recipe.data.streaming else prepared.train_rows.sha256
    facts = resume_facts(
        flat_values(recipe), num_rows=len(prepared.train_rows), rows_sha256=sha256, global_batch=plan.global_batch
    )
    checkpoint = choose_checkpoint(recipe.output, accelerator, session.screen)
    state = TrainState() if checkpoint is None else read_state(checkpoint, facts, session.screen)
    return Start(accelerator, schedule, facts, checkpoint, state)


def require_same_rows(accelerator: Accelerator, sha256: str) -> None:
    """Raise DataError unless all ranks have the same rows: each node may have prepared its own."""
    if len(set(gather_object([sha256]))) > 1:
        raise DataError(
            "the nodes have different training rows: a data file, the tokenizer or a version of a library differs.\n"
            "Make them the same, or name a dataset_prepared_path on a disk that all nodes share."
        )


def choose_checkpoint(section: OutputSection, accelerator: Accelerator, screen: Screen) -> Path | None:
    """Return the checkpoint to go on from, chosen and verified by the main rank for all; None: from the start.

    Raises CheckpointError if there is none that is complete, or this node does not have it.
    """
    requested, output_dir = section.resume_from_checkpoint, Path(section.output_dir)
    if requested is False:
        return None
    chosen = by_main_rank(accelerator, lambda: _verified_checkpoint(requested, output_dir, screen))
    if chosen is not None and not (chosen / "state.json").exists():
        raise CheckpointError(
            f"the main rank goes on from {chosen}, which this node does not have.\n"
            "Name an output_dir on a disk that all nodes share."
        )
    return chosen


def _verified_checkpoint(requested: str | bool, output_dir: Path, screen: Screen) -> Path | None:
    if isinstance(requested, str):
        require_intact(Path(requested))
        if (output_dir / "metrics.jsonl").exists() and Path(requested).resolve().parent.parent != output_dir.resolve():
            raise CheckpointError(
                f"'{output_dir}' holds another run than the checkpoint '{requested}'.\n"
                "Name an empty folder (output_dir=...), or write resume_from_checkpoint=true for the run in it."
            )
        return Path(requested)
    chosen = newest_intact(output_dir, lambda text: screen.line(f"note: {text}"))
    if chosen is None and list_checkpoints(output_dir):
        raise CheckpointError(
            f"every checkpoint in {output_dir / 'checkpoints'} is damaged.\n"
            "Start again: overwrite_output_dir=true resume_from_checkpoint=false"
        )
    if chosen is None:
        screen.line(f"no checkpoint in {output_dir} yet: starting from the base model")
    return chosen


def read_state(checkpoint: Path, facts: dict[str, Any], screen: Screen) -> TrainState:
    """Return the state of a checkpoint. Raises CheckpointError unless a run of these facts can go on from it."""
    saved = read_saved_state(checkpoint)
    for note in check_resume(saved.facts, facts):
        screen.line(f"note: {note}")
    if saved.facts.get("model_only"):
        raise CheckpointError(
            f"{checkpoint} was saved with save_only_model: it has no optimizer's state to go on with.\n"
            "Its weights can be the base_model (or lora_model_dir) of a new run."
        )
    return saved.state
