"""One training run, composed: from a recipe to its result. Start here to read the code."""

from collections.abc import Iterable

from finetuner.checkpoint.contents import read_optimizer
from finetuner.data.dropped_rows import LISTED
from finetuner.data.train_loader import TrainLoader, build_train_loader, prefetching
from finetuner.models.freed_memory import returning_freed_memory
from finetuner.parallel.launch import by_main_rank, leave_ranks
from finetuner.recipe import Recipe
from finetuner.run.checkpointer import Checkpointer, step_uploads
from finetuner.run.inputs import Inputs, prepare_inputs
from finetuner.run.layout import ReadyToTrain, lay_over_ranks
from finetuner.run.model import build_model
from finetuner.run.observers import open_observers
from finetuner.run.output import clear_output_dir, has_result, write_final_result
from finetuner.run.result import TrainResult
from finetuner.run.session import Session, open_session
from finetuner.run.start import Start, join_ranks
from finetuner.run.summary import print_plan
from finetuner.training.loop import Hooks
from finetuner.training.loop import train as train_loop
from finetuner.training.state import TrainState
from finetuner.training.stopping import stop_requests


def train(recipe: Recipe, file: str | None = None, notes: Iterable[str] = ()) -> TrainResult:
    """Train as the recipe says, from the start or from a checkpoint, and return what came of it.

    `file`: the recipe's, by which messages call it; None: the copy that the run writes. `notes` are shown first.
    Called on every rank. Raises FinetunerError.
    """
    with open_session(recipe, file, notes) as session:
        inputs = prepare_inputs(session)
        start = join_ranks(session, inputs)
        state = start.state
        if start.is_last_step_done and has_result(session):
            _say_nothing_to_do(session, start)
        else:
            with returning_freed_memory(), session.screen.work("loading the model", "MB") as work:
                model = build_model(session, inputs, start, work.at_bytes)
                ready = lay_over_ranks(session, inputs, start, model)
            state = fit(session, inputs, start, ready)
            write_final_result(session, inputs, ready, state)
        leave_ranks(start.accelerator)
        return TrainResult.read(session.output_dir, state)


def fit(session: Session, inputs: Inputs, start: Start, ready: ReadyToTrain) -> TrainState:
    """Run the loop, with its events wired to files and screen. Called by all ranks together."""
    recipe, screen, output_dir = session.recipe, session.screen, session.output_dir
    state, run = start.state, ready.run
    if start.checkpoint is not None:
        read_optimizer(ready.trained, start.checkpoint)
        screen.line(f"resuming from {start.checkpoint}: step {state.step} of {start.schedule.total_steps}")
    print_plan(session, inputs, ready)
    loader = build_train_loader(
        recipe.data,
        inputs.vocabulary.tokenizer,
        inputs.prepared.train_rows,
        session.plan,
        start.schedule,
        ready.layout,
        start.checkpoint,
        dropped_file=output_dir / LISTED if session.world.is_main else None,
        say=screen.line,
    )
    by_main_rank(start.accelerator, lambda: clear_output_dir(session, ready, state))
    ahead = prefetching(loader, start.schedule.total_steps, pin=start.accelerator.device.type == "cuda")
    try:
        with (
            stop_requests(screen.line) as request,
            open_observers(session, ready, state.step) as observers,
            ahead as batches,
            step_uploads(recipe.output, is_main=session.world.is_main, say=screen.line) as uploads,
        ):
            for line in loader.first_rows_at_a_glance(state.step):
                screen.line(line)
            save = Checkpointer(
                ready.trained,
                recipe.output,
                sharded=session.plan.parallel.sharded_checkpoints,
                keeps_best=run.guards.saves_best,
                loader=loader,
                facts=start.facts,
                observers=tuple(observers),
                uploads=uploads,
            ).save
            state = train_loop(run, batches, state, Hooks(observers, save, stop_requested=lambda: bool(request)))
    finally:
        _say_what_was_dropped(loader, session)
    _say_how_it_ended(session, state, start.schedule.total_steps)
    return state


def _say_nothing_to_do(session: Session, start: Start) -> None:
    session.screen.line(
        f"{session.output_dir} is trained already: {start.state.step} of {start.schedule.total_steps} steps. "
        "Nothing to do."
    )


def _say_what_was_dropped(loader: TrainLoader, session: Session) -> None:
    """Say which rows of a stream were dropped, cut or split; of prepared rows it is said at the start."""
    num_read, notes = loader.dropped_rows()
    if notes:
        listed = session.output_dir / LISTED
        session.screen.line(f"of {num_read:,} rows read, dropped, cut or split (the first of each are in {listed}):")
        for note in notes:
            session.screen.line(f"  {note}")


def _say_how_it_ended(session: Session, state: TrainState, total_steps: int) -> None:
    screen = session.screen
    if state.skipped_steps:
        screen.line(f"note: {state.skipped_steps} of {state.step} steps were skipped: loss or gradient was not finite")
    if state.stopped_early:
        screen.line(
            f"stopped after step {state.step} of {total_steps}: the held-out loss was not lower in "
            f"{state.evals_without_gain} evaluations"
        )
    if session.recipe.guards.load_best_model_at_end:
        loss = "no evaluation was finite" if state.best_eval_loss is None else f"loss {state.best_eval_loss:.4f}"
        screen.line(f"the result is of step {state.best_step or state.step}, the best on held-out rows ({loss})")
