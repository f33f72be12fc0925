"""The loop: one step, one evaluation, and the order of events around them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn

from finetuner.data.batch_sampler import evaluation_batches
from finetuner.data.batches import Batch, Layout
from finetuner.data.prepared_data import SourceRange
from finetuner.data.shuffling import derive_seed
from finetuner.data.token_store import TokenRows
from finetuner.errors import PreemptedError
from finetuner.objectives.text_score import TextScore, total
from finetuner.parallel.engine import Engine
from finetuner.plan.flops import Work
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.training.guards import Guards
from finetuner.training.metrics import peak_memory_bytes
from finetuner.training.state import TrainState


@dataclass(frozen=True)
class Run:
    """What a step needs."""

    accelerator: Accelerator
    engine: Engine
    plan: Plan
    schedule: Schedule
    held_out_rows: TokenRows
    max_grad_norm: float
    layout: Layout
    eval_layout: Layout
    guards: Guards
    held_out_ranges: tuple[SourceRange, ...] = ()  # of held_out_rows, source by source; none: all are one part
    token_bytes: tuple[int, ...] | None = None  # bytes of text that each token stands for, where they are known
    work: Work | None = None  # what the model computes, where a formula says it
    device_peak_flops: float | None = None  # FLOPs a second of one rank's device, where they are known


@dataclass(frozen=True)
class StepStats:
    """Over all ranks and micro-batches. `loss` is the mean over the trained tokens; `num_tokens` counts them."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    input_tokens: int  # without padding
    num_pairs: int  # see Batch
    updated: bool


@dataclass(frozen=True)
class Events:
    """What the loop announces; each hook decides nothing about time, that is the schedule's."""

    stepped: Callable[[TrainState, StepStats, float], None]  # seconds that the step took
    logged: Callable[[dict], None]
    evaluated: Callable[[dict], None]
    save: Callable[[TrainState, bool], None]  # true: because the run was asked to stop
    eval_progress: Callable[[int], None]  # rows evaluated on this rank
    stop_wished: Callable[[], bool]  # of this rank


def train(run: Run, batches: Callable[[int], list[Batch]], state: TrainState, events: Events) -> TrainState:
    """Go on from `state` to the last step, or until the guards stop it. `batches` gives this rank's of a step.

    Raises TrainingError if the run goes wrong, and PreemptedError, after saving, if any rank was asked to stop.
    """
    schedule, guards = run.schedule, run.guards
    # Under fp16 a skipped step is the scaler's daily work; elsewhere it may mean that the weights are broken.
    saves_when_bad = run.plan.precision == "fp16"
    if state.step == 0 and schedule.eval_on_start:
        events.evaluated(_evaluation_row(run, state, events))
    tokens, flops, seconds = 0, 0.0, 0.0
    run.engine.module.train()  # the models of transformers begin in evaluation; evaluations leave it as it is here
    saved_at = state.step
    while state.step < schedule.total_steps and not state.stopped_early:
        if _stop_is_wished(run, events):
            if state.step > saved_at and (saves_when_bad or not state.bad_steps):
                events.save(state, True)
            raise PreemptedError(f"stopped by a signal after step {state.step} of {schedule.total_steps}.")
        started = time.perf_counter()
        stats = train_step(run, batches(state.step), state.step)
        state = replace(state, step=state.step + 1, trained_tokens=state.trained_tokens + stats.num_tokens)
        state = guards.after_step(state, updated=stats.updated, loss=stats.loss)
        elapsed = time.perf_counter() - started
        tokens, seconds = tokens + stats.input_tokens, seconds + elapsed
        if run.work is not None:
            flops += run.work.flops(stats.input_tokens, stats.num_tokens, stats.num_pairs)
        events.stepped(state, stats, elapsed)
        if schedule.logs_at(state.step):
            events.logged(_log_row(run, state, stats, tokens / seconds) | _utilisation(run, flops / seconds))
            tokens, flops, seconds = 0, 0.0, 0.0
        guards.require_sound(state, loss=stats.loss, grad_norm=stats.grad_norm, peak_lr=schedule.peak_lr)
        if len(run.held_out_rows) and schedule.evaluates_at(state.step):
            row = _evaluation_row(run, state, events)
            events.evaluated(row)
            state = guards.after_evaluation(state, row["eval_loss"])
        best = guards.saves_best and state.best_step == state.step  # its loss is finite: so are the weights
        due = schedule.saves_at(state.step, last=state.stopped_early) and (saves_when_bad or not state.bad_steps)
        if best or due:
            events.save(state, False)
            saved_at = state.step
    return state


def _stop_is_wished(run: Run, events: Events) -> bool:
    """The same answer on every rank: one that stopped alone would leave the others waiting for it."""
    wished = events.stop_wished()
    if run.plan.data_parallel == 1:
        return wished
    anyone = torch.tensor(int(wished), device=run.accelerator.device)
    return bool(run.accelerator.reduce(anyone, "sum"))


def train_step(run: Run, batches: list[Batch], step: int) -> StepStats:
    """Descend along d(summed loss / trained tokens), over all ranks and micro-batches at once."""
    accelerator, plan, engine = run.accelerator, run.plan, run.engine
    lr = run.schedule.lr_at(step)
    engine.set_learning_rate(lr)
    # Dropout is a function of (seed, step, rank), so that a resumed run needs no generator's state.
    torch.manual_seed(derive_seed(plan.seed, step, plan.rank) >> 1)
    group = [b.to(accelerator.device) for b in batches]
    counts = torch.tensor(
        [sum(count) for count in zip(*((b.num_trained, b.num_tokens, b.num_pairs) for b in group), strict=True)],
        device=accelerator.device,
    )
    num_tokens, input_tokens, num_pairs = (int(n) for n in accelerator.reduce(counts, "sum"))
    # The gradients of the ranks are averaged. Undo that: the gradient must not depend on how the global batch is split.
    scale = plan.data_parallel / num_tokens
    summed = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(group, 1):
        with engine.micro_batch(last=i == len(group)):
            loss = loss_of(engine.module, batch)
            engine.backward(loss * scale)
        summed += loss.detach()
    loss_sum = float(accelerator.reduce(summed, "sum"))  # makes a GPU's queue run dry, as the norm does, once a step
    grad_norm, updated = engine.update(run.max_grad_norm, loss_is_finite=math.isfinite(loss_sum))
    return StepStats(loss_sum / num_tokens, grad_norm, lr, num_tokens, input_tokens, num_pairs, updated=updated)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Summed loss of a batch; `model` is a TokenLoss, prepared."""
    return model(batch.input_ids, batch.attention_mask, batch.positions, batch.targets, batch.position_ids)


@torch.no_grad()
def evaluate(run: Run, progress: Callable[[int], None] = lambda rows: None) -> dict[str, TextScore]:
    """The loss on the held-out rows of each source, by its name; the same at every batch size."""
    device = run.accelerator.device
    parts = run.held_out_ranges or (SourceRange("", 0, len(run.held_out_rows)),)
    table = torch.tensor(run.token_bytes or (), device=device)
    sums = torch.zeros((len(parts), 3), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    with _evaluating(run.engine.module):
        for place, part in zip(sums, parts, strict=True):
            rows = range(part.start, part.stop)
            for host_batch in evaluation_batches(run.held_out_rows, run.plan, run.eval_layout, numbers=rows):
                batch = host_batch.to(device)
                place[0] += loss_of(run.engine.module, batch)
                place[1] += batch.num_trained
                place[2] += table[batch.targets].sum() if len(table) else 0
                progress(len(batch.input_ids))
    totals = run.accelerator.reduce(sums, "sum").tolist()
    return {
        part.name: TextScore(loss, int(count), int(size))
        for part, (loss, count, size) in zip(parts, totals, strict=True)
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


def _log_row(run: Run, state: TrainState, stats: StepStats, tokens_per_second: float) -> dict:
    return {
        "step": state.step,
        "epoch": run.schedule.epoch_at(state.step),
        "loss": stats.loss,
        "learning_rate": stats.learning_rate,
        "grad_norm": stats.grad_norm,
        "num_tokens": stats.num_tokens,
        "total_tokens": state.trained_tokens,
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
    }


def _utilisation(run: Run, flops_per_second: float) -> dict[str, float]:
    """Model FLOP utilisation (flops.py), where both the formula and the devices' peak are known."""
    if run.work is None or run.device_peak_flops is None:
        return {}
    return {"mfu": flops_per_second / (run.device_peak_flops * run.plan.data_parallel)}


def _evaluation_row(run: Run, state: TrainState, events: Events) -> dict:
    by_source = evaluate(run, events.eval_progress)
    held = total(by_source.values())
    row = {"step": state.step, "eval_loss": held.loss, "eval_perplexity": held.perplexity}
    if held.num_bytes:
        row["eval_bits_per_byte"] = held.bits_per_byte
    if len(by_source) > 1:
        row |= {f"eval_loss/{name}": one.loss for name, one in by_source.items()}
    return row
