"""The composition root: one function per command, each builds the parts in order and hands them on."""

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from finetuner import __version__
from finetuner.checkpoint import (
    aside_of,
    checkpoint_folder,
    list_checkpoints,
    newest_whole,
    prune,
    read_saved,
    require_whole,
    save_checkpoint,
    set_aside_after,
)
from finetuner.data.prepare import Prepared, prepare
from finetuner.errors import CheckpointError, FinetunerError, ModelError
from finetuner.export.merge import merge_adapter, require_same_base
from finetuner.models.adapter import add_lora, read_adapter
from finetuner.models.attention import choose_attention
from finetuner.models.build import (
    count_parameters,
    embedding_rows,
    empty_model,
    grow_embeddings,
    length_notes,
    load_model,
    recompute_activations,
    train_in_fp32,
    trainable_parameters,
)
from finetuner.models.loss import TokenLoss, head_is_composable
from finetuner.models.tokenizer import Vocabulary, load_tokenizer
from finetuner.output import claimed, remove_run_files, require_space
from finetuner.plan import Plan, Precision, Schedule
from finetuner.recipe import Loaded, Recipe, dump_recipe, flat_values
from finetuner.resume import check_resume, resume_facts
from finetuner.sharding import FsdpPlan
from finetuner.training.accelerator import build_accelerator, build_engine, leave_ranks, use_threads_and_matmuls
from finetuner.training.loop import Events, Run, StepStats, TrainState
from finetuner.training.loop import train as train_loop
from finetuner.training.metrics import MetricsFile
from finetuner.training.optimizer import build_optimizer
from finetuner.training.parts import has_parts
from finetuner.training.progress import Screen, TrainingProgress, duration
from finetuner.weights import (
    Weights,
    checkpoint_bytes,
    gather,
    read_optimizer,
    read_parts,
    result_mark,
    write_checkpoint,
    write_parts,
    write_result,
)
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(loaded: Loaded, recipe_name: str) -> None:
    """Train as the recipe says, from the start or from a checkpoint. Raises FinetunerError."""
    recipe = loaded.recipe
    world = World.detect()
    screen = Screen(speaks=world.is_main)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    plan = Plan.from_recipe(recipe, world)
    for note in plan.engine_notes:
        screen.line(f"note: {note}")
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
        except BaseException as error:
            if not isinstance(error, FinetunerError) and list_checkpoints(Path(output.output_dir)):
                screen.line(
                    f"resume with: accelerate launch -m finetuner.train {recipe_name} resume_from_checkpoint=true"
                )
            raise


def _train(recipe: Recipe, recipe_name: str, world: World, plan: Plan, screen: Screen) -> None:
    vocabulary = load_tokenizer(recipe.tokenizer, recipe.model.base_model, recipe.model.trust_remote_code)
    with screen.work("tokenising", "rows") as work:
        prepared = prepare(recipe.data, vocabulary.tokenizer, plan.seed, work.at)
    schedule = plan.schedule(recipe, len(prepared.train))
    attention = choose_attention(recipe.model.attn_implementation, world, plan.precision)
    accelerator = build_accelerator(plan, world)
    output_dir, is_lora = Path(recipe.output.output_dir), recipe.adapter.adapter == "lora"

    facts = resume_facts(
        flat_values(recipe),
        num_rows=len(prepared.train),
        rows_sha256=prepared.train.sha256,
        global_batch=plan.global_batch,
    )
    checkpoint = choose_checkpoint(recipe, accelerator, screen)
    state = TrainState()
    if checkpoint is not None:
        saved = read_saved(checkpoint)
        state = saved.state
        for note in check_resume(saved.facts, facts):
            screen.line(f"note: {note}")
        if state.step >= schedule.total_steps and result_mark(output_dir, is_lora).exists():
            screen.line(
                f"{output_dir} is trained already: {state.step} of {schedule.total_steps} steps. Nothing to do."
            )
            return

    bare = build_model(recipe, plan, vocabulary, attention, checkpoint, accelerator)
    for note in length_notes(bare.bare, prepared.train.longest):
        screen.line(f"note: {note}")
    counted = count_parameters(bare)
    run = Run(
        accelerator=accelerator,
        engine=build_engine(
            accelerator,
            bare,
            plan,
            full=not is_lora,
            make_optimizer=lambda: build_optimizer(trainable_parameters(bare), recipe.optimizer),
        ),
        plan=plan,
        schedule=schedule,
        train_rows=prepared.train,
        held_out_rows=prepared.held_out,
        max_grad_norm=recipe.optimizer.max_grad_norm,
    )
    parameters, token_ids = trainable_parameters(bare), special_ids(recipe, vocabulary.tokenizer)
    weights = Weights(run, bare, parameters, vocabulary.tokenizer, is_lora, token_ids)
    if checkpoint is not None:
        read_optimizer(weights, checkpoint)
        screen.line(f"resuming from {checkpoint}: step {state.step} of {schedule.total_steps}")
    print_plan(recipe, weights, counted, prepared, recipe_name, screen)
    if accelerator.is_main_process:
        make_room(recipe, recipe_name, counted[0], state, screen)
    fit(recipe, weights, facts, state, screen)
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
    leave_ranks(accelerator)


def make_room(recipe: Recipe, recipe_name: str, num_trained: int, state: TrainState, screen: Screen) -> None:
    """What is removed or replaced in output_dir goes now, when nothing can be wrong with the input any more."""
    output_dir, keep = Path(recipe.output.output_dir), recipe.output.save_total_limit
    if recipe.output.overwrite_output_dir:
        remove_run_files(output_dir, keep=Path(recipe_name))
    for folder in set_aside_after(output_dir, state.step):
        screen.line(f"note: {folder} is of steps that this run takes anew; delete it if you do not need it")
    require_space(output_dir, checkpoint_bytes(num_trained), (keep or 1) + 1)
    result_mark(output_dir, recipe.adapter.adapter == "lora").unlink(missing_ok=True)
    copy = output_dir / "recipe.yml"
    if copy.resolve() != Path(recipe_name).resolve():
        heading = f"{Path(recipe_name).name} as finetuner {__version__} understood it"
        copy.write_text(dump_recipe(recipe, heading), encoding="utf-8")


def choose_checkpoint(recipe: Recipe, accelerator: Accelerator, screen: Screen) -> Path | None:
    """The checkpoint to go on from, chosen and verified by the main rank for all; None means from the start."""
    wish = recipe.output.resume_from_checkpoint
    if wish is False:
        return None
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        output_dir = Path(recipe.output.output_dir)
        if isinstance(wish, str):
            require_whole(Path(wish))
            if (output_dir / "metrics.jsonl").exists() and Path(wish).resolve().parent.parent != output_dir.resolve():
                raise CheckpointError(
                    f"'{output_dir}' holds another run than the checkpoint '{wish}'.\n"
                    "Name an empty folder (output_dir=...), or write resume_from_checkpoint=true for the run in it."
                )
            chosen = [Path(wish)]
        else:
            chosen = [newest_whole(output_dir, lambda text: screen.line(f"note: {text}"))]
            if chosen == [None] and list_checkpoints(output_dir):
                raise CheckpointError(
                    f"every checkpoint in {output_dir / 'checkpoints'} is damaged.\n"
                    "Start anew: overwrite_output_dir=true resume_from_checkpoint=false"
                )
            if chosen == [None]:
                screen.line(f"no checkpoint in {output_dir} yet: starting from the base model")
    return broadcast_object_list(chosen)[0]


def build_model(
    recipe: Recipe,
    plan: Plan,
    vocabulary: Vocabulary,
    attention: tuple[str, ...],
    checkpoint: Path | None,
    accelerator: Accelerator,
) -> TokenLoss:
    """Base (or, for full fine-tuning, the checkpoint's weights), adapter, and the loss around both; on the CPU if an
    engine takes them to the device in parts."""
    full, config = recipe.adapter.adapter is None, recipe.sharding.fsdp_config
    in_parts = checkpoint is not None and has_parts(checkpoint)
    source = str(checkpoint) if full and checkpoint is not None and not in_parts else recipe.model.base_model
    # Ranks that are handed their part by the main one need no weights of their own.
    handed = isinstance(plan.engine, FsdpPlan) and plan.engine.main_rank_reads and not accelerator.is_main_process
    model = (empty_model if handed else load_model)(
        source,
        dtype=torch.float32 if full else DTYPES[plan.precision],
        attention=attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    new_ids = ids_to_train(model, vocabulary)
    grow_embeddings(model, len(vocabulary.tokenizer))
    if plan.engine is None:
        model.to(accelerator.device)
        with accelerator.autocast():
            composed = head_is_composable(model)
    else:  # it may be larger than the device
        composed = broadcast_object_list([not handed and head_is_composable(model)])[0]
    if recipe.precision.gradient_checkpointing or (config is not None and config.activation_checkpointing):
        recompute_activations(model)
    if full:
        if checkpoint is not None and in_parts and not handed:
            read_parts(model, checkpoint, trained_only=False)
        return TokenLoss(model, composed=composed)
    adapted = add_lora(
        model,
        recipe.adapter,
        base_model=recipe.model.base_model,
        seed=plan.seed,
        new_token_ids=new_ids,
    )
    train_in_fp32(adapted)
    if checkpoint is not None and in_parts:
        read_parts(adapted, checkpoint, trained_only=True)
    elif checkpoint is not None:
        read_adapter(adapted, checkpoint)
    return TokenLoss(adapted, composed=composed)


def ids_to_train(model: "PreTrainedModel", vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens that the base model has never seen: added by the recipe, or beyond the base's embedding rows because the
    tokenizer is another one."""
    known = len(vocabulary.tokenizer) - len(vocabulary.new_ids)
    return tuple(range(min(known, embedding_rows(model)), len(vocabulary.tokenizer)))


def special_ids(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Role -> id of the special tokens that the recipe names, such as {"eos_token_id": 2}."""
    named = recipe.tokenizer.special_tokens.model_dump(exclude_none=True)
    ids: Any = tokenizer.convert_tokens_to_ids(list(named.values()))
    return {f"{role}_id": token_id for role, token_id in zip(named, ids, strict=True)}


def fit(recipe: Recipe, weights: Weights, facts: dict[str, Any], state: TrainState, screen: Screen) -> TrainState:
    """Run the loop with its events wired to files and screen."""
    run, output_dir = weights.run, Path(recipe.output.output_dir)
    main = run.accelerator.is_main_process
    metrics = MetricsFile(output_dir / "metrics.jsonl", resume_after=state.step or None) if main else None

    def record(show: Any, row: dict) -> None:
        if metrics is not None:
            metrics.write(row)
        show(row)

    def stepped(state: TrainState, stats: StepStats, seconds: float) -> None:
        progress.stepped(state.step, stats.loss, stats.learning_rate, stats.input_tokens, seconds)
        if not stats.updated:
            screen.line(f"step {state.step}: loss {stats.loss}, gradient norm {stats.grad_norm}: the update is skipped")

    def save(state: TrainState) -> None:
        folder, engine = checkpoint_folder(output_dir, state.step), run.plan.engine
        if isinstance(engine, FsdpPlan) and engine.sharded_checkpoints:
            write = partial(write_parts, weights)
            if not main:
                write(aside_of(folder))
        else:
            write = partial(write_checkpoint, weights, gather(weights, optimizer=True))
        if main:
            save_checkpoint(folder, state, facts, write)
            prune(output_dir, recipe.output.save_total_limit)
        run.accelerator.wait_for_everyone()

    mine = -(-len(run.held_out_rows) // run.plan.data_parallel)
    with TrainingProgress(screen, run.schedule.total_steps, state.step, eval_rows=mine) as progress:
        events = Events(
            stepped=stepped,
            logged=partial(record, progress.logged),
            evaluated=partial(record, progress.evaluated),
            save=save,
            eval_progress=progress.evaluating,
        )
        return train_loop(run, state, events)


def print_plan(
    recipe: Recipe,
    weights: Weights,
    counted: tuple[int, int],
    prepared: Prepared,
    recipe_name: str,
    screen: Screen,
) -> None:
    """Called by all ranks together; the main one prints."""
    plan, schedule, base = weights.run.plan, weights.run.schedule, weights.bare.bare
    trainable, total = counted
    device = weights.run.accelerator.device
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    rows = [
        ("recipe", recipe_name),
        ("model", f"{recipe.model.base_model} ({type(base).__name__}), {base.config._attn_implementation} attention"),
        ("parameters", f"{trainable:,} trained of {total:,} ({trainable / total:.2%})"),
        ("precision", f"{plan.precision} on {where}; trained weights in fp32"),
        ("engine", weights.run.engine.name),
        ("each rank holds", _held_line(weights.run)),
        ("rows", _rows_line(prepared)),
        ("global batch", plan.batch_equation),
        ("steps", _steps_line(schedule)),
        ("learning rate", _rate_line(schedule)),
        ("output", recipe.output.output_dir),
    ]
    screen.table(rows)
    for note in prepared.notes:
        screen.line(f"note: {note}")
    screen.line()


def _held_line(run: Run) -> str:
    """What the ranks hold between steps; the range over them where they differ."""
    held = gather_object([run.engine.held()])

    def span(values: list[int], unit: str) -> str:
        low, high = min(values), max(values)
        return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}"

    return ", ".join(
        (
            span([h.parameters for h in held], "parameters"),
            span([h.optimizer for h in held], "updated by it"),
            span([h.num_bytes for h in held], "bytes"),
        )
    )


def _rows_line(prepared: Prepared) -> str:
    store = prepared.train
    line = f"{len(store):,} to train on ({store.num_tokens:,} tokens, {store.num_trained:,} trained)"
    return line + (f", {len(prepared.held_out):,} held out" if len(prepared.held_out) else "")


def _steps_line(schedule: Schedule) -> str:
    epochs = schedule.epoch_at(schedule.total_steps)
    return f"{schedule.total_steps:,} = {epochs:.4g} epochs of {schedule.steps_per_epoch:,}"


def _rate_line(schedule: Schedule) -> str:
    return f"{schedule.peak_lr:g}, {schedule.shape}, {schedule.warmup_steps} warmup steps"


def merge(loaded: Loaded, recipe_name: str) -> None:
    """Merge the adapter in output_dir into its base, to output_dir/merged. Raises FinetunerError."""
    recipe = loaded.recipe
    screen = Screen(speaks=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    output_dir = Path(recipe.output.output_dir)
    if recipe.adapter.adapter is None:
        raise ModelError(
            "this recipe trains the whole model: there is no adapter to merge. "
            f"The trained weights are in {output_dir} as they are."
        )
    if not (output_dir / "adapter_config.json").exists():
        raise ModelError(
            f"there is no trained adapter in {output_dir}. Train it first:\n"
            f"  accelerate launch -m finetuner.train {recipe_name}"
        )
    quiet_libraries(screen)
    require_same_base(output_dir, recipe.model.base_model)
    from transformers import AutoTokenizer

    token_ids = special_ids(recipe, AutoTokenizer.from_pretrained(output_dir))
    with screen.work("merging", "MB") as work:
        merged = merge_adapter(output_dir, recipe.model.base_model, output_dir / "merged", work.at, token_ids)
    screen.line(
        f"merged {merged.num_merged} of {merged.num_tensors} tensors ({merged.num_bytes / 1e6:,.0f} MB) in "
        f"{duration(merged.seconds)}"
    )
    screen.line(f"done: {merged.folder}")


def quiet_libraries(screen: Screen) -> None:
    """Our own lines say what a user needs; the libraries' stay for errors."""
    import datasets
    import transformers

    # Their deprecations among each other are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|datasets|peft|torch|transformers)\b")
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    if not (screen.speaks and screen.terminal):
        transformers.logging.disable_progress_bar()
