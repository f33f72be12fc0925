"""What a run is going to be, as the short table at its start."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from finetuner.checkpoint.contents import Weights
from finetuner.console import Screen
from finetuner.data.batch_sampler import padding_share
from finetuner.data.prepared_data import PreparedData
from finetuner.models.load import count_parameters
from finetuner.models.quantized import quantized_layers, record_of
from finetuner.plan.parallel import EnginePlan, ZeroPlan, filled_in
from finetuner.plan.schedule import Schedule
from finetuner.recipe import Recipe
from finetuner.training.loop import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def print_plan(
    recipe: Recipe,
    weights: Weights,
    counted: tuple[int, int],
    prepared: PreparedData,
    recipe_name: str,
    screen: Screen,
) -> None:
    """Called by all ranks together; the main one prints."""
    plan, schedule, base = weights.run.plan, weights.run.schedule, weights.bare.bare
    trainable, total = counted
    device = weights.run.accelerator.device
    threads = torch.get_num_threads()
    where = f"{device.type}, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type
    rows = [
        ("recipe", recipe_name),
        ("model", f"{recipe.model.base_model} ({type(base).__name__}), {base.config._attn_implementation} attention"),
        ("parameters", f"{trainable:,} trained of {total:,} ({trainable / total:.2%})"),
        ("precision", f"{plan.precision} on {where}; trained weights in fp32"),
        ("engine", weights.run.engine.name),
        *_filled_rows(plan.engine, base),
        ("each rank holds", _held_line(weights.run)),
        *_base_rows(base),
        ("rows", rows_line(prepared, recipe)),
        ("batches", _padding_line(weights.run, prepared)),
        ("global batch", plan.batch_equation),
        ("steps", _steps_line(schedule)),
        ("learning rate", _rate_line(schedule)),
        ("output", recipe.output.output_dir),
    ]
    screen.table(rows)
    for note in prepared.notes:
        screen.line(f"note: {note}")
    screen.line()


def _filled_rows(engine: EnginePlan, base: "PreTrainedModel") -> list[tuple[str, str]]:
    """What became of DeepSpeed's "auto"."""
    if not (isinstance(engine, ZeroPlan) and engine.filled_in):
        return []
    return [("deepspeed", filled_in(engine, base.config.get_text_config().hidden_size))]


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


def _base_rows(base: "PreTrainedModel") -> list[tuple[str, str]]:
    """How a quantised base is held, and how many bytes it takes."""
    record = record_of(base)
    if record is None:
        return []
    held = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    layers = quantized_layers(base).values()
    share = sum(layer.in_features * layer.out_features for layer in layers) / count_parameters(base)[1]
    of = f"{len(record.modules)} linear layers, {share:.1%} of the weights"
    return [("base", f"{record.format}: {of}; {held / 1e6:,.1f} MB in all")]


def rows_line(prepared: PreparedData, recipe: Recipe) -> str:
    store = prepared.train
    held_out = f", {len(prepared.held_out):,} held out" if len(prepared.held_out) else ""
    if recipe.data.streaming:
        return f"streamed from {', '.join(entry.path for entry in recipe.data.datasets)}{held_out}"
    line = f"{len(store):,} to train on ({store.num_tokens:,} tokens, {store.num_trained:,} trained)"
    if prepared.train_packs is not None:
        line += f" in {len(prepared.train_packs):,} packs, {prepared.train_packs.fill:.1%} full"
    return line + held_out


def _padding_line(run: Run, prepared: PreparedData) -> str:
    what = "packed rows, documents apart" if run.layout.packed else "padded rows"
    if not len(prepared.train_rows):
        return what
    share = padding_share(prepared.train_rows, run.plan, run.schedule, run.layout)
    return f"{what}; {share:.1%} of the tokens computed are padding"


def _steps_line(schedule: Schedule) -> str:
    epochs = schedule.epoch_at(schedule.total_steps)
    first, others = schedule.steps_of_first_epoch, schedule.steps_per_epoch
    line = f"{schedule.total_steps:,} = {epochs:.4g} epochs of {first:,}"
    return f"{line}, from the second on {others:,}" if first != others and schedule.total_steps > first else line


def _rate_line(schedule: Schedule) -> str:
    return f"{schedule.peak_lr:g}, {schedule.shape}, {schedule.warmup_steps} warmup steps"
