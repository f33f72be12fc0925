"""What all ranks agree on before they begin: the rows, and the checkpoint to go on from."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from finetuner.checkpoint.compatibility import check_resume
from finetuner.checkpoint.folder import list_checkpoints, newest_intact, read_saved_state, require_intact
from finetuner.console import Screen
from finetuner.errors import CheckpointError, DataError
from finetuner.parallel.launch import by_main_rank
from finetuner.recipe import Recipe
from finetuner.training.state import TrainState


def require_same_rows(accelerator: Accelerator, sha256: str) -> None:
    """Raises DataError unless all ranks have the same rows: each node may have prepared its own."""
    if len(set(gather_object([sha256]))) > 1:
        raise DataError(
            "the nodes have different training rows: a data file, the tokenizer or a version of a library differs.\n"
            "Make them the same, or name a dataset_prepared_path on a disk that all nodes share."
        )


def choose_checkpoint(recipe: Recipe, accelerator: Accelerator, screen: Screen) -> Path | None:
    """The checkpoint to go on from, chosen and verified by the main rank for all; None means from the start."""
    wish, output_dir = recipe.output.resume_from_checkpoint, Path(recipe.output.output_dir)
    if wish is False:
        return None
    chosen = by_main_rank(accelerator, lambda: _whole_checkpoint(wish, output_dir, screen))
    if chosen is not None and not (chosen / "state.json").exists():
        raise CheckpointError(
            f"the main rank goes on from {chosen}, which this node does not have.\n"
            "Name an output_dir on a disk that all nodes share."
        )
    return chosen


def _whole_checkpoint(wish: str | bool, output_dir: Path, screen: Screen) -> Path | None:
    if isinstance(wish, str):
        require_intact(Path(wish))
        if (output_dir / "metrics.jsonl").exists() and Path(wish).resolve().parent.parent != output_dir.resolve():
            raise CheckpointError(
                f"'{output_dir}' holds another run than the checkpoint '{wish}'.\n"
                "Name an empty folder (output_dir=...), or write resume_from_checkpoint=true for the run in it."
            )
        return Path(wish)
    chosen = newest_intact(output_dir, lambda text: screen.line(f"note: {text}"))
    if chosen is None and list_checkpoints(output_dir):
        raise CheckpointError(
            f"every checkpoint in {output_dir / 'checkpoints'} is damaged.\n"
            "Start anew: overwrite_output_dir=true resume_from_checkpoint=false"
        )
    if chosen is None:
        screen.line(f"no checkpoint in {output_dir} yet: starting from the base model")
    return chosen


def state_of(checkpoint: Path, facts: dict[str, Any], screen: Screen) -> TrainState:
    """Raises CheckpointError unless a run of these facts can go on from there."""
    saved = read_saved_state(checkpoint)
    for note in check_resume(saved.facts, facts):
        screen.line(f"note: {note}")
    if saved.facts.get("model_only"):
        raise CheckpointError(
            f"{checkpoint} was saved with save_only_model: it has no optimizer's state to go on with.\n"
            "Its weights can be the base_model (or lora_model_dir) of a new run."
        )
    return saved.state
