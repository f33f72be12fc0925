"""The composition root of training: builds the parts in order and hands them on. commands.py has the other commands."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from finetuner import __version__
from finetuner.checkpoint.compatibility import resume_facts
from finetuner.checkpoint.contents import (
    Weights,
    checkpoint_bytes,
    gather,
    read_optimizer,
    result_mark,
    write_best,
    write_checkpoint,
    write_model,
    write_parts,
    write_result,
)
from finetuner.checkpoint.folder import (
    aside_of,
    checkpoint_folder,
    list_checkpoints,
    prune,
    save_checkpoint,
    set_aside_after,
)
from finetuner.checkpoint.output_dir import claimed, remove_run_files, require_space
from finetuner.console import Screen, quiet_libraries
from finetuner.data.batches import layout_of
from finetuner.data.cache import packs_held_out, tokenizer_digest
from finetuner.data.dropped_rows import LISTED
from finetuner.data.inputs import prepare_inputs
from finetuner.data.prepared_data import PreparedData
from finetuner.data.token_bytes import token_bytes
from finetuner.data.tokenizer import Vocabulary, special_ids
from finetuner.data.train_loader import TrainLoader, build_train_loader, prefetching
from finetuner.errors import FinetunerError, LostConnectionError, PreemptedError
from finetuner.estimate.fit import require_fit
from finetuner.export.hub import require_hub, upload_result
from finetuner.export.model_card import write_card
from finetuner.models.attention import choose_attention
from finetuner.models.document_isolation import wants_flat_packs
from finetuner.models.dtypes import DTYPES
from finetuner.models.freed_memory import giving_back
from finetuner.models.from_scratch import begun_model, scratch_config
from finetuner.models.generation import sample_text
from finetuner.models.load import (
    count_parameters,
    length_notes,
    reading_notes,
    trainable_parameters,
    vocabulary_parameters,
)
from finetuner.models.model_flops import work_of
from finetuner.models.pickled_weights import readable_base
from finetuner.models.quantized import (
    choose_format,
    require_bitsandbytes,
)
from finetuner.objectives.probe import probe
from finetuner.parallel.launch import (
    build_accelerator,
    build_engine,
    by_main_rank,
    leave_ranks,
    use_threads_and_matmuls,
)
from finetuner.plan.flops import peak_of
from finetuner.plan.parallel import FsdpPlan
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe import Loaded, Recipe, dump_recipe, flat_values
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.sections import GuardSection, TrackingSection
from finetuner.redaction import without_secrets
from finetuner.run.build import build_model
from finetuner.run.resume import choose_checkpoint, require_same_rows, state_of
from finetuner.run.summary import print_plan
from finetuner.training.guards import Guards
from finetuner.training.loop import Events, Run, StepStats
from finetuner.training.loop import train as train_loop
from finetuner.training.metrics import MetricsFile
from finetuner.training.optimizer import build_optimizer, own_rates
from finetuner.training.progress import TrainingProgress
from finetuner.training.state import TrainState
from finetuner.training.stopping import stop_wishes
from finetuner.training.trackers import Trackers, require_trackers
from finetuner.training.watchdog import stacks_when_stuck
from finetuner.world import World

if TYPE_CHECKING:
    pass


def train(loaded: Loaded, recipe_name: str) -> None:
    """Train as the recipe says, from the start or from a checkpoint. Raises FinetunerError."""
    recipe = loaded.recipe
    world = World.detect()
    screen = Screen(speaks=world.is_main)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    plan = Plan.from_recipe(recipe, world)
    require_trackers(recipe.tracking)
    require_hub(recipe.output.hub_model_id)
    for engine_note in plan.engine_notes:
        screen.line(f"note: {engine_note}")
    quiet_libraries(screen)
    use_threads_and_matmuls(world, recipe.precision.tf32)
    if not world.is_main:
        _train(recipe, recipe_name, world, plan, screen)
        return
    output = recipe.output
    replaces = output.resume_from_checkpoint is not False or output.overwrite_output_dir
    with claimed(Path(output.output_dir), replaces=replaces):
        try:
            _train(recipe, recipe_name, world, plan, screen)
            what = "A model" if recipe.adapter.adapter is None else "An adapter"
            write_card(Path(output.output_dir), Path(output.output_dir), recipe.model.base_model, what)
            if output.hub_model_id is not None and output.hub_strategy == "end":
                screen.line(f"uploading {output.output_dir} to {output.hub_model_id}")
                place = upload_result(Path(output.output_dir), output.hub_model_id, private=output.hub_private_repo)
                screen.line(f"done: the result is at {place}")
        except BaseException as error:
            ours = isinstance(error, FinetunerError) and not isinstance(error, PreemptedError | LostConnectionError)
            if not ours and list_checkpoints(Path(output.output_dir)):
                screen.line(
                    f"resume with: accelerate launch -m finetuner.train {recipe_name} resume_from_checkpoint=true"
                )
            raise


def _train(recipe: Recipe, recipe_name: str, world: World, plan: Plan, screen: Screen) -> None:
    # What is missing on this machine is said before anything is fetched or prepared.
    attention = choose_attention(recipe.model.attn_implementation, world, plan.precision)
    if choose_format(recipe.adapter.adapter, recipe.quantization, torch.float32) is not None:
        require_bitsandbytes()
    begun = recipe.model.base_model == FROM_SCRATCH  # its size is known with its vocabulary
    if not begun:
        require_fit(recipe, plan, world, attention)
    vocabulary, prepared = prepare_inputs(
        recipe.model, recipe.tokenizer, recipe.data, recipe.packing, world=world, seed=plan.seed, screen=screen
    )
    base = readable_base(recipe, world)
    if begun:
        config = scratch_config(recipe.model.model, vocabulary.tokenizer)
        require_fit(recipe, plan, world, attention, config)
        base = begun_model(config, recipe.data.dataset_prepared_path, plan.seed, world)
    streams = recipe.data.streaming
    schedule = plan.schedule(recipe, len(prepared.train_rows), prepared.train.num_tokens)
    accelerator = build_accelerator(plan, world, recipe.sharding.ddp_timeout)
    output_dir, is_lora = Path(recipe.output.output_dir), recipe.adapter.adapter is not None

    require_same_rows(accelerator, prepared.train_rows.sha256)
    facts = resume_facts(
        flat_values(recipe),
        num_rows=len(prepared.train_rows),
        rows_sha256=tokenizer_digest(vocabulary.tokenizer) if streams else prepared.train_rows.sha256,
        global_batch=plan.global_batch,
    )
    checkpoint = choose_checkpoint(recipe, accelerator, screen)
    state = TrainState()
    if checkpoint is not None:
        state = state_of(checkpoint, facts, screen)
        if (state.stopped_early or state.step >= schedule.total_steps) and result_mark(output_dir, is_lora).exists():
            screen.line(
                f"{output_dir} is trained already: {state.step} of {schedule.total_steps} steps. Nothing to do."
            )
            leave_ranks(accelerator)
            return

    peak = peak_of(world.device_name) if plan.precision != "fp32" else None  # the table is of 16-bit formats
    with giving_back():
        weights, counted = assemble(
            recipe, base, plan, schedule, vocabulary, prepared, attention, checkpoint, accelerator, screen, peak
        )
    if checkpoint is not None:
        read_optimizer(weights, checkpoint)
        screen.line(f"resuming from {checkpoint}: step {state.step} of {schedule.total_steps}")
    print_plan(recipe, weights, counted, prepared, recipe_name, screen)
    layout = weights.run.layout
    feed = build_train_loader(
        recipe.data, vocabulary.tokenizer, prepared.train_rows, plan, schedule, layout, checkpoint,
        dropped_file=output_dir / LISTED if world.is_main else None, say=screen.line,
    )  # fmt: skip
    by_main_rank(accelerator, lambda: make_room(recipe, recipe_name, counted[0], state, screen))
    try:
        state = fit(recipe, weights, feed, facts, state, screen)
    finally:
        say_what_was_lost(feed, output_dir / LISTED, screen)
    say_how_it_ended(recipe.guards, state, schedule.total_steps, screen)
    if recipe.guards.load_best_model_at_end and state.best_step not in (None, state.step):
        best = state.best_step or 0
        by_main_rank(accelerator, lambda: write_best(weights, output_dir, DTYPES[plan.precision], best))
    else:
        write_result(weights, output_dir, DTYPES[plan.precision])
    accelerator.wait_for_everyone()
    if is_lora:
        screen.line(f"done: the adapter is in {output_dir}")
        if vocabulary.new_ids:
            rows = len(vocabulary.tokenizer)
            screen.line(f"note: to load it with peft, call resize_token_embeddings({rows}) on the base first")
        screen.line(f"merge it into the base: python -m finetuner.merge {recipe_name}")
    else:
        screen.line(f"done: the model is in {output_dir}")
        for note in reading_notes(weights.bare.bare):
            screen.line(f"note: {note}")
    leave_ranks(accelerator)


def assemble(
    recipe: Recipe,
    base: str,
    plan: Plan,
    schedule: Schedule,
    vocabulary: Vocabulary,
    prepared: PreparedData,
    attention: tuple[str, ...],
    checkpoint: Path | None,
    accelerator: Accelerator,
    screen: Screen,
    device_peak: float | None = None,
) -> tuple[Weights, tuple[int, int]]:
    """The model in its engine, ready to train; and its parameters, counted before they were spread. `device_peak`:
    FLOPs a second of the device, by its data sheet."""
    is_lora = recipe.adapter.adapter is not None
    with screen.work("loading the model", "MB") as work:
        built = build_model(recipe, base, plan, vocabulary, attention, checkpoint, accelerator, work.at_bytes)
        bare = built.loss
        for note in length_notes(bare.bare, prepared.train.longest or recipe.data.sequence_len):
            screen.line(f"note: {note}")
        counted = count_parameters(bare)
        tables = vocabulary_parameters(bare, bare.bare)
        flops = work_of(bare.model, bare.bare, prepared.train.longest or recipe.data.sequence_len)
        rates = own_rates(trainable_parameters(bare), recipe.rates, schedule.peak_lr, tables)
        engine = build_engine(
            accelerator,
            bare,
            plan,
            full=not is_lora,
            make_optimizer=lambda device: build_optimizer(
                trainable_parameters(bare), recipe.optimizer, device=device, rates=rates, vocabulary=tables
            ),
            promises=built.promises,
        )
    packs = recipe.packing.sample_packing or packs_held_out(recipe.packing)
    with torch.no_grad():
        bare.composed = bool(engine.module(partial(probe, packs=packs)))
    if flops is not None and not bare.composed:
        flops = flops.with_head_everywhere()
    flat = wants_flat_packs(bare.bare)
    run = Run(
        accelerator=accelerator,
        engine=engine,
        plan=plan,
        schedule=schedule,
        held_out_rows=prepared.held_out_rows,
        held_out_ranges=prepared.held_out_ranges,
        token_bytes=token_bytes(vocabulary.tokenizer) if len(prepared.held_out_rows) else None,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        layout=layout_of(recipe.packing, recipe.data.sequence_len, packed=recipe.packing.sample_packing, flat=flat),
        eval_layout=layout_of(
            recipe.packing, recipe.data.sequence_len, packed=prepared.held_out_packs is not None, flat=flat
        ),
        guards=Guards.from_section(recipe.guards, plan.precision, recipe.output.save_strategy),
        work=flops,
        device_peak_flops=recipe.output.device_peak_flops or device_peak,
    )
    token_ids = special_ids(recipe.tokenizer, vocabulary.tokenizer)
    return Weights(run, bare, trainable_parameters(bare), vocabulary.tokenizer, is_lora, token_ids), counted


def make_room(recipe: Recipe, recipe_name: str, num_trained: int, state: TrainState, screen: Screen) -> None:
    """What is removed or replaced in output_dir goes now, when nothing can be wrong with the input any more."""
    output_dir, keep = Path(recipe.output.output_dir), recipe.output.save_total_limit
    if recipe.output.overwrite_output_dir:
        remove_run_files(output_dir, keep=Path(recipe_name))
    for folder in set_aside_after(output_dir, state.step):
        screen.line(f"note: {folder} is of steps that this run takes anew; delete it if you do not need it")
    count = (keep or 1) + 1 + (recipe.guards.load_best_model_at_end or recipe.output.save_strategy == "best")
    require_space(output_dir, checkpoint_bytes(num_trained), count)
    result_mark(output_dir, recipe.adapter.adapter is not None).unlink(missing_ok=True)
    copy = output_dir / "recipe.yml"
    if copy.resolve() != Path(recipe_name).resolve():
        heading = f"{Path(recipe_name).name} as finetuner {__version__} understood it"
        copy.write_text(dump_recipe(recipe, heading), encoding="utf-8")


def fit(
    recipe: Recipe, weights: Weights, feed: TrainLoader, facts: dict[str, Any], state: TrainState, screen: Screen
) -> TrainState:
    """Run the loop with its events wired to files and screen."""
    run, output_dir = weights.run, Path(recipe.output.output_dir)
    main = run.accelerator.is_main_process
    metrics = MetricsFile(output_dir / "metrics.jsonl", resume_after=state.step or None) if main else None
    tracking = recipe.tracking if main else TrackingSection()
    shown = without_secrets(flat_values(recipe))
    trackers = Trackers.open(tracking, output_dir, shown, done=state.step, say=screen.line)

    def record(show: Any, row: dict) -> None:
        if metrics is not None:
            metrics.write(row)
            trackers.log(row)
        show(row)

    def stepped(state: TrainState, stats: StepStats, seconds: float) -> None:
        alive()
        progress.stepped(state.step, stats.loss, stats.learning_rate, stats.input_tokens, seconds)
        if not stats.updated:
            screen.line(f"step {state.step}: loss {stats.loss}, gradient norm {stats.grad_norm}: the update is skipped")
        every = recipe.evaluation.generate_samples
        if main and every is not None and state.step % every == 0:
            text = sample_text(weights.bare.model, weights.tokenizer, recipe.evaluation.generate_prompt, state.step)
            screen.line(f"step {state.step} writes: {text}")

    def evaluating(rows: int) -> None:
        alive()
        progress.evaluating(rows)

    def save(state: TrainState, stops: bool) -> None:
        alive()
        model_only = recipe.output.save_only_model and not stops
        folder, engine = checkpoint_folder(output_dir, state.step), run.plan.engine
        write: Callable[[Path], None]
        if isinstance(engine, FsdpPlan) and engine.sharded_checkpoints:
            write = partial(write_parts, weights, model_only=model_only)
            if not main:
                write(aside_of(folder))
        else:
            gathered = gather(weights, optimizer=not model_only)
            write = partial(write_checkpoint, weights, gathered)
            if model_only:
                write = partial(write_model, weights, gathered.model)

        def write_all(aside: Path) -> None:
            write(aside)
            feed.write_position(state.step, aside)

        def seal_and_prune() -> None:
            save_checkpoint(folder, state, facts | {"model_only": model_only}, write_all)
            prune(output_dir, recipe.output.save_total_limit, state.best_step if run.guards.saves_best else None)

        by_main_rank(run.accelerator, seal_and_prune)
        alive()

    mine = -(-len(run.held_out_rows) // run.plan.data_parallel)
    total = run.schedule.total_steps
    bar = TrainingProgress(screen, total, state.step, eval_rows=mine, rows_seen=run.schedule.rows_seen)
    ahead = prefetching(feed, total, pin=run.accelerator.device.type == "cuda")
    stuck = stacks_when_stuck(recipe.sharding.ddp_timeout) if run.plan.data_parallel > 1 else nullcontext(lambda: None)
    with bar as progress, stop_wishes(screen.line) as wish, ahead as batches, stuck as alive:
        events = Events(
            stepped=stepped,
            logged=partial(record, progress.logged),
            evaluated=partial(record, progress.evaluated),
            save=save,
            eval_progress=evaluating,
            stop_wished=lambda: bool(wish),
        )
        well = False
        try:
            state = train_loop(run, batches, state, events)
            well = True
        finally:
            trackers.close(well=well)
        return state


def say_what_was_lost(feed: TrainLoader, listed: Path, screen: Screen) -> None:
    """The rows that a stream did not learn as they stand; of prepared rows it is said at the start."""
    num_read, notes = feed.dropped_rows()
    if notes:
        screen.line(f"of {num_read:,} rows read, not learned as they stand (the first of each are in {listed}):")
        for note in notes:
            screen.line(f"  {note}")


def say_how_it_ended(section: GuardSection, state: TrainState, total_steps: int, screen: Screen) -> None:
    if state.skipped_steps:
        screen.line(f"note: {state.skipped_steps} of {state.step} steps were skipped: loss or gradient was not finite")
    if state.stopped_early:
        screen.line(
            f"stopped after step {state.step} of {total_steps}: the held-out loss was not lower in "
            f"{state.evals_without_gain} evaluations"
        )
    if section.load_best_model_at_end:
        loss = "no evaluation was finite" if state.best_eval_loss is None else f"loss {state.best_eval_loss:.4f}"
        screen.line(f"the result is of step {state.best_step or state.step}, the best on held-out rows ({loss})")
