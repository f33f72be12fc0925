"""The loop: one step, and the order of events around it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from finetuner.data.batches import Batch
from finetuner.data.shuffling import derive_seed
from finetuner.errors import PreemptedError
from finetuner.objectives.base import Objective, figure_means, gradient_scales, step_loss
from finetuner.parallel.engine import Engine
from finetuner.plan.flops import TrainingFlops
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.training.evaluation import HeldOut, evaluate
from finetuner.training.guards import Guards
from finetuner.training.metrics import peak_memory_bytes
from finetuner.training.observers import Observer
from finetuner.training.records import EvaluationRecord, StepRecord
from finetuner.training.state import TrainState
from finetuner.training.stats import StepStats


@dataclass(frozen=True)
class Run:
    """The parts of a run that steps and evaluations need.

    `work`: FLOPs that the model computes, where a formula says it; `device_peak_flops`: FLOPs a second of one rank's
    device, where they are known.
    """

    accelerator: Accelerator
    engine: Engine
    objective: Objective
    plan: Plan
    schedule: Schedule
    guards: Guards
    held_out: HeldOut
    max_grad_norm: float
    work: TrainingFlops | None = None
    device_peak_flops: float | None = None


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop. `save` gets whether the run was asked to stop."""

    observers: Sequence[Observer]
    save: Callable[[TrainState, bool], None]
    stop_requested: Callable[[], bool]


def train(run: Run, batches: Callable[[int], list[Batch]], state: TrainState, hooks: Hooks) -> TrainState:
    """Go on from `state` to the last step, or until the guards stop it. `batches` gives this rank's of a step.

    Raises TrainingError if the run goes wrong, and PreemptedError, after saving, if any rank was asked to stop.
    """
    schedule, guards = run.schedule, run.guards
    if state.step == 0 and _is_evaluated(run, state):
        _evaluate(run, state, hooks)
    window = _Window()
    run.engine.module.train()  # the models of transformers begin in evaluation; evaluations leave it as it is here
    saved_at = state.step
    while state.step < schedule.total_steps and not state.stopped_early:
        if _any_rank_stops(run, hooks):
            if state.step > saved_at and _weights_are_sound(run, state):
                hooks.save(state, True)
            raise PreemptedError(f"stopped by a signal after step {state.step} of {schedule.total_steps}.")
        state, stats = _step(run, batches, state, window, hooks)
        if schedule.logs_at(state.step):
            _announce_row(run, state, stats, window, hooks)
            window = _Window()
        guards.require_sound(state, loss=stats.loss, grad_norm=stats.grad_norm, peak_lr=schedule.peak_lr)
        if _is_evaluated(run, state):
            state = guards.after_evaluation(state, _evaluate(run, state, hooks).loss)
        if _is_saved(run, state):
            hooks.save(state, False)
            saved_at = state.step
    return state


def _step(
    run: Run, batches: Callable[[int], list[Batch]], state: TrainState, window: "_Window", hooks: Hooks
) -> tuple[TrainState, StepStats]:
    """Take one step, and announce it."""
    started = time.perf_counter()
    stats = train_step(run, batches(state.step), state.step)
    seconds = time.perf_counter() - started
    state = replace(state, step=state.step + 1, trained_tokens=state.trained_tokens + stats.num_tokens)
    state = run.guards.after_step(state, updated=stats.updated, loss=stats.loss)
    window.add(stats, seconds, run.work)
    for observer in hooks.observers:
        observer.step_done(state, stats, seconds)
    return state, stats


def _weights_are_sound(run: Run, state: TrainState) -> bool:
    """Return whether the weights may be saved: under fp16 a skipped step is routine for the loss scaler; elsewhere it
    may mean that they are broken."""
    return run.plan.precision == "fp16" or not state.bad_steps


def _is_evaluated(run: Run, state: TrainState) -> bool:
    """Return whether the held-out loss is taken after this step: never without held-out rows."""
    if not len(run.held_out.rows):
        return False
    return run.schedule.evaluates_at(state.step) if state.step else run.schedule.eval_on_start


def _is_saved(run: Run, state: TrainState) -> bool:
    if run.guards.saves_best and state.best_step == state.step:
        return True  # its loss is finite: so are the weights
    return run.schedule.saves_at(state.step, last=state.stopped_early) and _weights_are_sound(run, state)


def train_step(run: Run, batches: list[Batch], step: int) -> StepStats:
    """Descend along the gradient of sum_k w_k S_k / N_k (objectives/base.py), over all ranks and micro-batches at once.

    `batches`: this rank's micro-batches of the step after `step` steps.
    """
    accelerator, plan, engine, objective = run.accelerator, run.plan, run.engine, run.objective
    lr = run.schedule.lr_at(step)
    engine.set_learning_rate(lr)
    # Dropout is a function of (seed, step, rank), so that a resumed run needs no generator's state.
    torch.manual_seed(derive_seed(plan.seed, step, plan.data_parallel_rank) >> 1)
    group = [batch.to(accelerator.device) for batch in batches]
    of_batches = [(*objective.counts(b), b.num_trained, b.num_tokens, b.num_pairs) for b in group]
    totals = torch.tensor([sum(one) for one in zip(*of_batches, strict=True)], device=accelerator.device)
    *counts, num_tokens, num_input_tokens, num_pairs = accelerator.reduce(totals, "sum").tolist()
    # The N_k are known before the first backward, so that the gradient cannot depend on how the batch is split.
    scales = torch.tensor(gradient_scales(objective, counts, plan.data_parallel), device=accelerator.device)
    summed = torch.zeros(len(objective.terms) + len(objective.figures), device=accelerator.device)
    for i, batch in enumerate(group, 1):
        with engine.micro_batch(last=i == len(group)):
            sums = engine.module(batch.tensors())
            engine.backward((sums[: len(scales)] * scales).sum())
        summed += sums.detach()
    sums_of_step = accelerator.reduce(summed, "sum").tolist()  # empties a GPU's queue, as the norm does, once a step
    loss = step_loss(objective, sums_of_step, counts)
    grad_norm, updated = engine.update(run.max_grad_norm, loss_is_finite=math.isfinite(loss))
    return StepStats(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=lr,
        num_tokens=num_tokens,
        num_input_tokens=num_input_tokens,
        num_pairs=num_pairs,
        updated=updated,
        figures=figure_means(objective, sums_of_step, counts),
    )


def _any_rank_stops(run: Run, hooks: Hooks) -> bool:
    """Return the same answer on every rank: one that stopped alone would leave the others waiting for it."""
    requested = hooks.stop_requested()
    if run.plan.parallel.world_size == 1:
        return requested
    anyone = torch.tensor(int(requested), device=run.accelerator.device)
    return bool(run.accelerator.reduce(anyone, "sum"))


def _evaluate(run: Run, state: TrainState, hooks: Hooks) -> EvaluationRecord:
    def report(num_rows: int) -> None:
        for observer in hooks.observers:
            observer.evaluating(num_rows)

    row = evaluate(run.accelerator, run.engine, run.objective, run.plan, run.held_out, state.step, report)
    for observer in hooks.observers:
        observer.evaluated(row)
    return row


class _Window:
    """Tokens, FLOPs and seconds since the last logged step."""

    def __init__(self) -> None:
        self.num_input_tokens, self.flops, self.seconds = 0, 0.0, 0.0

    def add(self, stats: StepStats, seconds: float, work: TrainingFlops | None) -> None:
        self.num_input_tokens += stats.num_input_tokens
        self.seconds += seconds
        if work is not None:
            self.flops += work.flops(stats.num_input_tokens, stats.num_tokens, stats.num_pairs)


def _announce_row(run: Run, state: TrainState, stats: StepStats, window: _Window, hooks: Hooks) -> None:
    mfu = None
    if run.work is not None and run.device_peak_flops is not None:
        mfu = window.flops / window.seconds / (run.device_peak_flops * run.plan.parallel.world_size)
    row = StepRecord(
        step=state.step,
        epoch=run.schedule.epoch_at(state.step),
        loss=stats.loss,
        learning_rate=stats.learning_rate,
        grad_norm=stats.grad_norm,
        num_tokens=stats.num_tokens,
        total_tokens=state.trained_tokens,
        tokens_per_second=window.num_input_tokens / window.seconds,
        peak_memory_bytes=peak_memory_bytes(run.accelerator.device),
        mfu=mfu,
        figures=stats.figures,
    )
    for observer in hooks.observers:
        observer.logged(row)
