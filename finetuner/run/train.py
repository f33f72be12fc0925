"""One training run, composed: from a recipe to its result. Start here to read the code."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from finetuner import __version__
from finetuner.checkpoint.contents import (
    checkpoint_bytes,
    read_optimizer,
    result_mark,
    write_best,
    write_result,
)
from finetuner.checkpoint.folder import set_aside_after
from finetuner.checkpoint.output_dir import METRICS, remove_run_files, require_space
from finetuner.data.dropped_rows import LISTED
from finetuner.data.step_batches import Feed, build_feed, prefetched
from finetuner.models.dtypes import DTYPES
from finetuner.models.load import reading_notes
from finetuner.parallel.launch import by_main_rank, leave_ranks
from finetuner.recipe import Recipe, dump_recipe, flat_values
from finetuner.redaction import without_secrets
from finetuner.run.checkpointer import Checkpointer
from finetuner.run.inputs import Inputs, prepare_inputs
from finetuner.run.layout import ReadyToTrain, build_engine_and_run
from finetuner.run.observers import MetricsLog, TextSamples
from finetuner.run.result import TrainResult
from finetuner.run.session import Session, open_session
from finetuner.run.start import Start, join_ranks
from finetuner.run.summary import print_plan
from finetuner.training.loop import Hooks
from finetuner.training.loop import train as train_loop
from finetuner.training.observers import Observer
from finetuner.training.progress import TrainingProgress
from finetuner.training.state import TrainState
from finetuner.training.stopping import stop_requests
from finetuner.training.trackers import Trackers
from finetuner.training.watchdog import Watchdog, stacks_when_stuck


def train(recipe: Recipe, name: str | None = None, notes: Iterable[str] = ()) -> TrainResult:
    """Train as the recipe says, from the start or from a checkpoint, and return what came of it.

    `name`: how messages call the recipe, so that it can be typed; default: the copy that the run writes. `notes` are
    shown first. Called on every rank. Raises FinetunerError.
    """
    name = name or str(Path(recipe.output.output_dir) / "recipe.yml")
    with open_session(recipe, name, notes) as session:
        inputs = prepare_inputs(session)
        start = join_ranks(session, inputs)
        if start.is_last_step_done and result_mark(session.output_dir, session.is_adapter).exists():
            return _nothing_to_do(session, start)
        ready = build_engine_and_run(session, inputs, start)
        state = fit(session, inputs, start, ready)
        return _write_result(session, inputs, start, ready, state)


def fit(session: Session, inputs: Inputs, start: Start, ready: ReadyToTrain) -> TrainState:
    """Run the loop, with its events wired to files and screen. Called by all ranks together."""
    recipe, screen, output_dir = session.recipe, session.screen, session.output_dir
    state, run = start.state, ready.run
    if start.checkpoint is not None:
        read_optimizer(ready.trained, start.checkpoint)
        screen.line(f"resuming from {start.checkpoint}: step {state.step} of {start.schedule.total_steps}")
    print_plan(session, inputs, ready)
    feed = build_feed(
        recipe.data,
        inputs.vocabulary.tokenizer,
        inputs.prepared.train_rows,
        session.plan,
        start.schedule,
        ready.layout,
        start.checkpoint,
        listed=output_dir / LISTED if session.world.is_main else None,
        say=screen.line,
    )
    by_main_rank(start.accelerator, lambda: _make_room(session, ready, state))
    ahead = prefetched(feed, start.schedule.total_steps, pin=start.accelerator.device.type == "cuda")
    try:
        with (
            _observers(session, start, ready) as observers,
            stop_requests(screen.line) as request,
            ahead as batches,
        ):
            save = Checkpointer(
                ready.trained,
                recipe.output,
                sharded=session.plan.parallel.sharded_checkpoints,
                keeps_best=run.guards.saves_best,
                feed=feed,
                facts=start.facts,
                observers=tuple(observers),
            ).save
            state = train_loop(run, batches, state, Hooks(observers, save, stop_requested=lambda: bool(request)))
    finally:
        _say_what_was_dropped(feed, session)
    _say_how_it_ended(session, state, start.schedule.total_steps)
    return state


@contextmanager
def _observers(session: Session, start: Start, ready: ReadyToTrain) -> Iterator[list[Observer]]:
    """Yield what is told of the run: watchdog, bar, metrics with trackers, and texts; and end them."""
    recipe, run, screen = session.recipe, ready.run, session.screen
    schedule, done = start.schedule, start.state.step
    several = session.plan.parallel.world_size > 1
    stuck = stacks_when_stuck(recipe.sharding.ddp_timeout) if several else nullcontext(lambda: None)
    rows_of_rank = -(-len(run.held_out.rows) // session.plan.data_parallel)
    bar = TrainingProgress(screen, schedule.total_steps, done, eval_rows=rows_of_rank, rows_seen=schedule.rows_seen)
    with bar as progress, stuck as alive:
        observers: list[Observer] = [Watchdog(alive)]
        trackers = None
        if session.world.is_main:
            shown = without_secrets(flat_values(recipe))
            trackers = Trackers.open(recipe.tracking, session.output_dir, shown, done=done, say=screen.line)
            observers.append(MetricsLog(session.output_dir / METRICS, trackers, resume_after=done or None))
        observers.append(progress)
        every = recipe.evaluation.generate_samples
        if session.world.is_main and every is not None:
            trained = ready.trained
            prompt = recipe.evaluation.generate_prompt
            observers.append(TextSamples(trained.loss.model, trained.tokenizer, prompt, every, screen))
        well = False
        try:
            yield observers
            well = True
        finally:
            if trackers is not None:
                trackers.close(well=well)


def _make_room(session: Session, ready: ReadyToTrain, state: TrainState) -> None:
    """Remove or replace what is in output_dir, now that nothing can be wrong with the input any more."""
    recipe, output_dir = session.recipe, session.output_dir
    if recipe.output.overwrite_output_dir:
        remove_run_files(output_dir, keep=Path(session.name))
    for folder in set_aside_after(output_dir, state.step):
        session.screen.line(f"note: {folder} is of steps that this run takes anew; delete it if you do not need it")
    keeps_best = recipe.guards.load_best_model_at_end or recipe.output.save_strategy == "best"
    count = (recipe.output.save_total_limit or 1) + 1 + keeps_best
    require_space(output_dir, checkpoint_bytes(ready.num_trained), count)
    result_mark(output_dir, session.is_adapter).unlink(missing_ok=True)
    copy = output_dir / "recipe.yml"
    if copy.resolve() != Path(session.name).resolve():
        heading = f"{Path(session.name).name} as finetuner {__version__} understood it"
        copy.write_text(dump_recipe(recipe, heading), encoding="utf-8")


def _write_result(
    session: Session, inputs: Inputs, start: Start, ready: ReadyToTrain, state: TrainState
) -> TrainResult:
    """Write the adapter or the model into output_dir, say what to do with it, and part from the other ranks."""
    recipe, output_dir, screen = session.recipe, session.output_dir, session.screen
    dtype = DTYPES[session.plan.precision]
    if recipe.guards.load_best_model_at_end and state.best_step not in (None, state.step):
        best = state.best_step or 0
        by_main_rank(start.accelerator, lambda: write_best(ready.trained, output_dir, dtype, best))
    else:
        write_result(ready.trained, output_dir, dtype)
    start.accelerator.wait_for_everyone()
    if session.is_adapter:
        screen.line(f"done: the adapter is in {output_dir}")
        if inputs.vocabulary.new_ids:
            rows = len(inputs.vocabulary.tokenizer)
            screen.line(f"note: to load it with peft, call resize_token_embeddings({rows}) on the base first")
        screen.line(f"merge it into the base: python -m finetuner.merge {session.name}")
    else:
        screen.line(f"done: the model is in {output_dir}")
        for note in reading_notes(ready.trained.loss.unwrapped):
            screen.line(f"note: {note}")
    leave_ranks(start.accelerator)
    return TrainResult.read(output_dir, state)


def _nothing_to_do(session: Session, start: Start) -> TrainResult:
    session.screen.line(
        f"{session.output_dir} is trained already: {start.state.step} of {start.schedule.total_steps} steps. "
        "Nothing to do."
    )
    leave_ranks(start.accelerator)
    return TrainResult.read(session.output_dir, start.state)


def _say_what_was_dropped(feed: Feed, session: Session) -> None:
    """Say which rows of a stream were not trained on as they stand; of prepared rows it is said at the start."""
    num_read, notes = feed.lost()
    if notes:
        listed = session.output_dir / LISTED
        session.screen.line(
            f"of {num_read:,} rows read, not learned as they stand (the first of each are in {listed}):"
        )
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
