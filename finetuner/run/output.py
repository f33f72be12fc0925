"""The output folder of a run: cleared before the first step, and filled with the result after the last."""

from pathlib import Path

from finetuner import __version__
from finetuner.checkpoint.contents import checkpoint_bytes, result_mark, write_best, write_result
from finetuner.checkpoint.folder import abandon_checkpoints_after
from finetuner.checkpoint.output_dir import remove_run_files, require_space
from finetuner.models.dtypes import DTYPES
from finetuner.models.embeddings import rows_for_tokens
from finetuner.models.model_folder import portability_notes
from finetuner.parallel.launch import by_main_rank
from finetuner.recipe import dump_recipe
from finetuner.run.inputs import Inputs
from finetuner.run.layout import ReadyToTrain
from finetuner.run.session import Session
from finetuner.training.state import TrainState


def has_result(session: Session) -> bool:
    """Return whether the output folder has a complete result."""
    return result_mark(session.output_dir, session.is_adapter).exists()


def clear_output_dir(session: Session, ready: ReadyToTrain, state: TrainState) -> None:
    """Clear output_dir for this run; called once the inputs have been checked."""
    recipe, output_dir = session.recipe, session.output_dir
    if recipe.output.overwrite_output_dir:
        remove_run_files(output_dir, keep=session.file)
    for folder in abandon_checkpoints_after(output_dir, state.step):
        session.screen.line(f"note: {folder} is of steps that this run takes again; delete it if you do not need it")
    keeps_best = recipe.guards.load_best_model_at_end or recipe.output.save_strategy == "best"
    count = (recipe.output.save_total_limit or 1) + 1 + keeps_best
    require_space(output_dir, checkpoint_bytes(ready.num_trained), count)
    result_mark(output_dir, session.is_adapter).unlink(missing_ok=True)
    copy = output_dir / "recipe.yml"
    if session.file is None or copy.resolve() != session.file.resolve():
        heading = f"{Path(session.name).name} as finetuner {__version__} understood it"
        copy.write_text(dump_recipe(recipe, heading), encoding="utf-8")


def write_final_result(session: Session, inputs: Inputs, ready: ReadyToTrain, state: TrainState) -> None:
    """Write the adapter or the model into output_dir, and say what to do with it. Called by all ranks together."""
    recipe, output_dir, screen = session.recipe, session.output_dir, session.screen
    dtype = DTYPES[session.plan.precision]
    if recipe.guards.load_best_model_at_end and state.best_step not in (None, state.step):
        best = state.best_step or 0
        by_main_rank(ready.run.accelerator, lambda: write_best(ready.trained, output_dir, dtype, best))
    else:
        write_result(ready.trained, output_dir, dtype)
    ready.run.accelerator.wait_for_everyone()
    if session.is_adapter:
        screen.line(f"done: the adapter is in {output_dir}")
        if inputs.vocabulary.new_ids:
            to_32x = recipe.tokenizer.resize_token_embeddings_to_32x
            rows = rows_for_tokens(len(inputs.vocabulary.tokenizer), to_32x=to_32x)
            screen.line(f"note: to load it with peft, call resize_token_embeddings({rows}) on the base first")
        screen.line(f"merge it into the base: python -m finetuner.merge {session.name}")
    else:
        screen.line(f"done: the model is in {output_dir}")
        for note in portability_notes(ready.trained.loss.unwrapped):
            screen.line(f"note: {note}")
