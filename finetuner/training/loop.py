"""The loop: one step, one evaluation, and the order of events around them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn

from finetuner.data.batches import Batch, Layout, evaluation_batches, step_batches
from finetuner.data.order import mix
from finetuner.data.tokens import Rows
from finetuner.errors import TrainingError
from finetuner.plan import Plan, Schedule
from finetuner.training.engine import Engine
from finetuner.training.metrics import peak_memory_bytes

# A single bad batch is survivable; weights that are NaN are not, and then every step is bad.
MAX_BAD_STEPS = 3
# The loss scaler of fp16 begins too high and halves at each overflow until it fits.
MAX_BAD_STEPS_FP16 = 20


@dataclass(frozen=True)
class TrainState:
    """All that a run has to remember beside weights and optimizer. Replaced, never edited."""

    step: int = 0  # steps done
    trained_tokens: int = 0
    bad_steps: int = 0  # steps in a row whose gradient was not finite


@dataclass(frozen=True)
class Run:
    """What a step needs."""

    accelerator: Accelerator
    engine: Engine
    plan: Plan
    schedule: Schedule
    train_rows: Rows
    held_out_rows: Rows
    max_grad_norm: float
    layout: Layout
    eval_layout: Layout


@dataclass(frozen=True)
class StepStats:
    """Over all ranks and micro-batches. `loss` is the mean over the trained tokens; `num_tokens` counts them."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    input_tokens: int  # without padding
    updated: bool


@dataclass(frozen=True)
class Events:
    """What the loop announces; each hook decides nothing about time, that is the schedule's."""

    stepped: Callable[[TrainState, StepStats, float], None]  # seconds that the step took
    logged: Callable[[dict], None]
    evaluated: Callable[[dict], None]
    save: Callable[[TrainState], None]
    eval_progress: Callable[[int], None]  # rows evaluated on this rank


def train(run: Run, state: TrainState, events: Events) -> TrainState:
    """Go on from `state` to the last step. Raises TrainingError if the gradient stays non-finite."""
    schedule = run.schedule
    if state.step == 0 and schedule.eval_on_start:
        events.evaluated(_evaluation_row(run, state, events))
    tokens, seconds = 0, 0.0
    while state.step < schedule.total_steps:
        started = time.perf_counter()
        stats = train_step(run, state.step)
        state = replace(
            state,
            step=state.step + 1,
            trained_tokens=state.trained_tokens + stats.num_tokens,
            bad_steps=0 if stats.updated else state.bad_steps + 1,
        )
        elapsed = time.perf_counter() - started
        tokens, seconds = tokens + stats.input_tokens, seconds + elapsed
        events.stepped(state, stats, elapsed)
        if schedule.logs_at(state.step):
            events.logged(_log_row(run, state, stats, tokens / seconds))
            tokens, seconds = 0, 0.0
        fp16 = run.plan.precision == "fp16"
        if state.bad_steps >= (MAX_BAD_STEPS_FP16 if fp16 else MAX_BAD_STEPS):
            raise TrainingError(
                f"loss or gradient was not finite in {state.bad_steps} steps in a row (the last: {state.step}, loss "
                f"{stats.loss}, gradient norm {stats.grad_norm}).\nNothing was saved since. Try a smaller "
                f"learning_rate (it is {schedule.peak_lr}), warmup_ratio=0.1, or bf16 instead of fp16."
            )
        if len(run.held_out_rows) and schedule.evaluates_at(state.step):
            events.evaluated(_evaluation_row(run, state, events))
        if schedule.saves_at(state.step) and (fp16 or not state.bad_steps):
            events.save(state)
    return state


def train_step(run: Run, step: int) -> StepStats:
    """Descend along d(summed loss / trained tokens), over all ranks and micro-batches at once."""
    accelerator, plan, engine = run.accelerator, run.plan, run.engine
    lr = run.schedule.lr_at(step)
    engine.set_learning_rate(lr)
    # Dropout is a function of (seed, step, rank), so that a resumed run needs no generator's state.
    torch.manual_seed(mix(plan.seed, step, plan.rank) >> 1)
    group = [b.to(accelerator.device) for b in step_batches(run.train_rows, plan, run.schedule, step, run.layout)]
    counts = torch.tensor(
        [sum(b.num_trained for b in group), sum(b.num_tokens for b in group)], device=accelerator.device
    )
    num_tokens, input_tokens = (int(n) for n in accelerator.reduce(counts, "sum"))
    # The gradients of the ranks are averaged. Undo that: the gradient must not depend on how the global batch is split.
    scale = plan.data_parallel / num_tokens
    engine.module.train()
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(group, 1):
        with engine.micro_batch(last=i == len(group)):
            loss = loss_of(engine.module, batch)
            engine.backward(loss * scale)
        total += loss.detach()
    loss_sum = float(accelerator.reduce(total, "sum"))  # makes a GPU's queue run dry, as the norm does, once a step
    grad_norm, updated = engine.update(run.max_grad_norm, loss_is_finite=math.isfinite(loss_sum))
    return StepStats(loss_sum / num_tokens, grad_norm, lr, num_tokens, input_tokens, updated=updated)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Summed loss of a batch; `model` is a TokenLoss, prepared."""
    return model(batch.input_ids, batch.attention_mask, batch.positions, batch.targets, batch.position_ids)


@torch.no_grad()
def evaluate(run: Run, progress: Callable[[int], None] = lambda rows: None) -> tuple[float, int]:
    """(mean loss over all trained tokens of the held-out rows, their number); the same at every batch size."""
    device = run.accelerator.device
    total = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    count = 0
    with _evaluating(run.engine.module):
        for host_batch in evaluation_batches(run.held_out_rows, run.plan, run.eval_layout):
            batch = host_batch.to(device)
            total += loss_of(run.engine.module, batch)
            count += batch.num_trained
            progress(len(batch.input_ids))
    sums = run.accelerator.reduce(torch.stack([total, torch.full_like(total, count)]), "sum")
    return float(sums[0] / sums[1]), int(sums[1])


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


def _evaluation_row(run: Run, state: TrainState, events: Events) -> dict:
    loss, _ = evaluate(run, events.eval_progress)
    # exp overflows a float above 709; a loss like that means a broken model, not a perplexity
    return {"step": state.step, "eval_loss": loss, "eval_perplexity": math.exp(loss) if loss < 700 else math.inf}
