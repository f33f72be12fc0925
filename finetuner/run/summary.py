"""The short table at the start of a run: what it is going to be."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from finetuner.data.batch_sampler import padding_share
from finetuner.data.prepared_data import PreparedData
from finetuner.models.quant_record import record_of
from finetuner.models.quantized_layers import quantized_layers
from finetuner.models.trainable import count_parameters
from finetuner.models.transformers_internals import attention_implementation
from finetuner.parallel.engine import Engine, RankMemory
from finetuner.plan.parallel import ParallelPlan
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.plan.zero import filled_in
from finetuner.recipe.sections import DataSection
from finetuner.run.inputs import Inputs
from finetuner.run.layout import ReadyToTrain
from finetuner.run.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def print_plan(session: Session, inputs: Inputs, ready: ReadyToTrain) -> None:
    """Print what the run is going to be. Called by all ranks together; the main one prints."""
    recipe, plan, schedule = session.recipe, session.plan, ready.run.schedule
    base, prepared = ready.trained.loss.unwrapped, inputs.prepared
    device = ready.run.accelerator.device
    threads = torch.get_num_threads()
    where = f"{device.type}, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type
    share = ready.num_trained / ready.num_parameters
    rows = [
        ("recipe", session.name),
        ("model", f"{recipe.model.base_model} ({type(base).__name__}), {attention_implementation(base)} attention"),
        ("parameters", f"{ready.num_trained:,} trained of {ready.num_parameters:,} ({share:.2%})"),
        ("precision", f"{plan.precision} on {where}; trained weights in fp32"),
        ("engine", ready.run.engine.name),
        *_deepspeed_rows(plan.parallel, base),
        ("each rank holds", _memory_line(ready.run.engine)),
        *_quantized_rows(base),
        ("rows", rows_line(prepared, recipe.data)),
        ("batches", _padding_line(ready, plan, prepared)),
        ("global batch", plan.batch_equation),
        ("steps", _steps_line(schedule)),
        ("learning rate", _rate_line(schedule)),
        ("output", recipe.output.output_dir),
    ]
    session.screen.table(rows)
    for line in prepared.rows_at_a_glance:
        session.screen.line(line)
    session.screen.line()


def _deepspeed_rows(parallel: ParallelPlan, base: "PreTrainedModel") -> list[tuple[str, str]]:
    """Return the row that says what each "auto" of DeepSpeed became, if there was one."""
    if parallel.zero is None or not parallel.zero.filled_in:
        return []
    return [("deepspeed", filled_in(parallel.zero, base.config.get_text_config().hidden_size))]


def _memory_line(engine: Engine) -> str:
    """Return what the ranks hold between steps; the range over them where they differ."""
    held: list[RankMemory] = gather_object([engine.memory()])

    def span(values: list[int], unit: str) -> str:
        low, high = min(values), max(values)
        return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}"

    return ", ".join(
        (
            span([one.num_parameters for one in held], "parameters"),
            span([one.num_updated for one in held], "updated by it"),
            span([one.num_bytes for one in held], "bytes"),
        )
    )


def _quantized_rows(base: "PreTrainedModel") -> list[tuple[str, str]]:
    """Return the row with the format of a quantized base and the bytes that it takes, if it is quantized."""
    record = record_of(base)
    if record is None:
        return []
    num_bytes = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    layers = quantized_layers(base).values()
    share = sum(layer.in_features * layer.out_features for layer in layers) / count_parameters(base)[1]
    of = f"{len(record.modules)} linear layers, {share:.1%} of the weights"
    return [("base", f"{record.format}: {of}; {num_bytes / 1e6:,.1f} MB in all")]


def rows_line(prepared: PreparedData, section: DataSection) -> str:
    """Return how many rows and tokens there are to train on, and how many are held out."""
    store = prepared.train
    held_out = f", {len(prepared.held_out):,} held out" if len(prepared.held_out) else ""
    if section.streaming:
        return f"streamed from {', '.join(entry.path for entry in section.datasets)}{held_out}"
    line = f"{len(store):,} to train on ({store.num_tokens:,} tokens, {store.num_trained:,} trained)"
    if prepared.train_packs is not None:
        line += f" in {len(prepared.train_packs):,} packs, {prepared.train_packs.fill:.1%} full"
    return line + held_out


def _padding_line(ready: ReadyToTrain, plan: Plan, prepared: PreparedData) -> str:
    what = "packed rows, documents apart" if ready.layout.packed else "padded rows"
    if not len(prepared.train_rows):
        return what
    share = padding_share(prepared.train_rows, plan, ready.run.schedule, ready.layout)
    return f"{what}; {share:.1%} of the tokens computed are padding"


def _steps_line(schedule: Schedule) -> str:
    epochs = schedule.epoch_at(schedule.total_steps)
    first, others = schedule.steps_of_first_epoch, schedule.steps_per_epoch
    line = f"{schedule.total_steps:,} = {epochs:.4g} epochs of {first:,}"
    return f"{line}, from the second on {others:,}" if first != others and schedule.total_steps > first else line


def _rate_line(schedule: Schedule) -> str:
    return f"{schedule.peak_lr:g}, {schedule.shape}, {schedule.warmup_steps} warmup steps"
