"""The composition root: one function per command, each builds the parts in order and hands them on."""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner import __version__
from finetuner.checkpoint import (
    Saved,
    checkpoint_folder,
    list_checkpoints,
    newest_whole,
    prune,
    read_saved,
    save_checkpoint,
    written_aside,
)
from finetuner.data.prepare import Prepared, prepare
from finetuner.errors import CheckpointError, FinetunerError, ModelError
from finetuner.export.merge import merge_adapter
from finetuner.models.adapter import add_lora, read_adapter, write_adapter
from finetuner.models.attention import choose_attention
from finetuner.models.build import (
    cast_weights,
    count_parameters,
    grow_embeddings,
    load_model,
    recompute_activations,
    train_in_fp32,
    trainable_parameters,
)
from finetuner.models.loss import TokenLoss, head_is_composable
from finetuner.models.tokenizer import Vocabulary, load_tokenizer
from finetuner.output import claimed, move_into, require_space
from finetuner.plan import Plan, Precision, Schedule
from finetuner.recipe import Loaded, Recipe, dump_recipe, flat_values
from finetuner.resume import check_resume, resume_facts
from finetuner.training.accelerator import build_accelerator, use_threads_and_matmuls
from finetuner.training.loop import Events, Run, StepStats, TrainState
from finetuner.training.loop import train as train_loop
from finetuner.training.metrics import MetricsFile
from finetuner.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from finetuner.training.progress import Screen, TrainingProgress, duration
from finetuner.world import World

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(loaded: Loaded, recipe_name: str) -> None:
    """Train as the recipe says, from the start or from a checkpoint. Raises FinetunerError."""
    recipe = loaded.recipe
    world = World.detect()
    screen = Screen(speaks=world.is_main)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    plan = Plan.from_recipe(recipe, world)
    quiet_libraries(screen)
    use_threads_and_matmuls(world, recipe.precision.tf32)
    if not world.is_main:
        _train(recipe, recipe_name, world, plan, screen)
        return
    output = recipe.output
    resumes = output.resume_from_checkpoint is not False
    with claimed(Path(output.output_dir), resumes=resumes, overwrite=output.overwrite_output_dir):
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

    facts = resume_facts(flat_values(recipe), num_rows=len(prepared.train), global_batch=plan.global_batch)
    checkpoint = choose_checkpoint(recipe, accelerator, screen)
    saved: Saved | None = None
    if checkpoint is not None:
        saved = read_saved(checkpoint)
        for note in check_resume(saved.facts, facts):
            screen.line(f"note: {note}")
        if saved.state.step >= schedule.total_steps and _final_weights(recipe).exists():
            screen.line(
                f"{recipe.output.output_dir} is trained already: {saved.state.step} of {schedule.total_steps} steps. "
                "Nothing to do."
            )
            return

    bare = build_model(recipe, plan, vocabulary, attention, checkpoint)
    module = accelerator.prepare(bare)
    parameters = trainable_parameters(bare)
    optimizer = build_optimizer(parameters, recipe.optimizer)
    state = TrainState()
    if checkpoint is not None and saved is not None:
        state = saved.state
        load_optimizer_tensors(optimizer, parameters, load_file(checkpoint / "optimizer.safetensors"))
        if accelerator.scaler is not None and (checkpoint / "scaler.json").exists():
            import json

            accelerator.scaler.load_state_dict(json.loads((checkpoint / "scaler.json").read_text()))
        screen.line(f"resuming from {checkpoint}: step {state.step} of {schedule.total_steps}")
    run = Run(
        accelerator=accelerator,
        model=module,
        optimizer=accelerator.prepare(optimizer),
        plan=plan,
        schedule=schedule,
        train_rows=prepared.train,
        held_out_rows=prepared.held_out,
        max_grad_norm=recipe.optimizer.max_grad_norm,
    )
    parts = Parts(recipe, run, bare, parameters, vocabulary, facts)
    print_plan(parts, prepared, attention, recipe_name, screen)
    if accelerator.is_main_process:
        require_space(Path(recipe.output.output_dir), _checkpoint_bytes(parts))
        write_recipe(recipe, recipe_name)
    fit(parts, state, screen)
    if accelerator.is_main_process:
        write_final(parts)
    accelerator.wait_for_everyone()
    if recipe.adapter.adapter == "lora":
        screen.line(f"done: the adapter is in {recipe.output.output_dir}")
        screen.line(f"merge it into the base: python -m finetuner.merge {recipe_name}")
    else:
        screen.line(f"done: the model is in {recipe.output.output_dir}")
    accelerator.end_training()


@dataclass(frozen=True)
class Parts:
    """Everything that saving needs beside the state."""

    recipe: Recipe
    run: Run
    bare: TokenLoss
    parameters: dict[str, nn.Parameter]
    vocabulary: Vocabulary
    facts: dict[str, Any]


def choose_checkpoint(recipe: Recipe, accelerator: Accelerator, screen: Screen) -> Path | None:
    """The checkpoint to go on from, chosen by the main rank for all; None means from the start."""
    wish = recipe.output.resume_from_checkpoint
    if wish is False:
        return None
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        if isinstance(wish, str):
            chosen = [Path(wish)]
        else:
            output_dir = Path(recipe.output.output_dir)
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
    recipe: Recipe, plan: Plan, vocabulary: Vocabulary, attention: str, checkpoint: Path | None
) -> TokenLoss:
    """Base (or, for full fine-tuning, the checkpoint's weights), adapter, and the loss around both."""
    full = recipe.adapter.adapter is None
    source = str(checkpoint) if full and checkpoint is not None else recipe.model.base_model
    model = load_model(
        source,
        dtype=torch.float32 if full else DTYPES[plan.precision],
        attention=attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    grow_embeddings(model, len(vocabulary.tokenizer))
    composed = head_is_composable(model)
    if recipe.precision.gradient_checkpointing:
        recompute_activations(model)
    if full:
        return TokenLoss(model, composed=composed)
    adapted = add_lora(
        model,
        recipe.adapter,
        base_model=recipe.model.base_model,
        seed=plan.seed,
        new_token_ids=vocabulary.new_ids,
    )
    train_in_fp32(adapted)
    if checkpoint is not None:
        read_adapter(adapted, checkpoint)
    return TokenLoss(adapted, composed=composed)


def fit(parts: Parts, state: TrainState, screen: Screen) -> TrainState:
    """Run the loop with its events wired to files and screen."""
    run, output_dir = parts.run, Path(parts.recipe.output.output_dir)
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
        if main:
            save_checkpoint(
                checkpoint_folder(output_dir, state.step), state, parts.facts, partial(write_weights, parts)
            )
            prune(output_dir, parts.recipe.output.save_total_limit)
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


def write_weights(parts: Parts, folder: Path) -> None:
    """What resuming needs: the adapter or the fp32 model, the tokenizer, and the optimizer's state."""
    write_model(parts, folder)
    optimizer = parts.run.optimizer.optimizer
    save_file(optimizer_tensors(optimizer, parts.parameters), folder / "optimizer.safetensors")
    if parts.run.accelerator.scaler is not None:
        import json

        (folder / "scaler.json").write_text(json.dumps(parts.run.accelerator.scaler.state_dict()))


def write_model(parts: Parts, folder: Path) -> None:
    model: Any = parts.bare.model
    if parts.recipe.adapter.adapter == "lora":
        write_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    parts.vocabulary.tokenizer.save_pretrained(folder)


def write_final(parts: Parts) -> None:
    """The result, into output_dir itself. A model trained in bf16 or fp16 is stored in it, as its base was."""
    output_dir = Path(parts.recipe.output.output_dir)
    if parts.recipe.adapter.adapter is None:
        cast_weights(parts.bare.model, DTYPES[parts.run.plan.precision])
    with written_aside(output_dir / "final.tmp") as aside:
        write_model(parts, aside)
    move_into(output_dir / "final.tmp", output_dir, last=_final_weights(parts.recipe).name)
    (output_dir / "final.tmp").rmdir()


def _final_weights(recipe: Recipe) -> Path:
    """The file whose presence says that the result is complete; written last."""
    name = "adapter_config.json" if recipe.adapter.adapter == "lora" else "config.json"
    return Path(recipe.output.output_dir) / name


def _checkpoint_bytes(parts: Parts) -> int:
    """Every trained parameter and AdamW's two moments of it in fp32; one more is there while it is written."""
    keep = parts.recipe.output.save_total_limit or 1
    return 12 * sum(p.numel() for p in parts.parameters.values()) * (keep + 1)


def write_recipe(recipe: Recipe, recipe_name: str) -> None:
    text = dump_recipe(recipe, f"{Path(recipe_name).name} as finetuner {__version__} understood it")
    (Path(recipe.output.output_dir) / "recipe.yml").write_text(text, encoding="utf-8")


def print_plan(parts: Parts, prepared: Prepared, attention: str, recipe_name: str, screen: Screen) -> None:
    plan, schedule, recipe = parts.run.plan, parts.run.schedule, parts.recipe
    trainable, total = count_parameters(parts.bare)
    device = parts.run.accelerator.device
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    rows = [
        ("recipe", recipe_name),
        ("model", f"{recipe.model.base_model} ({type(_base(parts.bare)).__name__}), {attention} attention"),
        ("parameters", f"{trainable:,} trained of {total:,} ({trainable / total:.2%})"),
        ("precision", f"{plan.precision} on {where}; trained weights in fp32"),
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


def _base(bare: TokenLoss) -> nn.Module:
    model: Any = bare.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    with screen.work("merging", "MB") as work:
        merged = merge_adapter(output_dir, recipe.model.base_model, output_dir / "merged", work.at)
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
