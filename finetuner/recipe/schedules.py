"""The learning-rate schedules, one row each: the options of lr_scheduler_kwargs, and the rate as a pure function.

Names and values are those of transformers' get_scheduler, and of Axolotl's schedulers.py for rex and the quadratic
warmup, so that curves of other tools can be laid over ours.
A further schedule is a row of SCHEDULES and its name in ScheduleShape.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ScheduleShape = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "polynomial", "inverse_sqrt", "warmup_stable_decay", "rex",
]  # fmt: skip

Options = Mapping[str, Any]  # lr_scheduler_kwargs
Mistakes = dict[str, str]  # name of an option, or "" for all of them -> the mistake


@dataclass(frozen=True)
class SchedulePoint:
    """The update after `step` updates, of a run of `total` updates with `warmup` and a rate of `peak` at most.

    `floor` and `settles`: cosine_min_lr_ratio and cosine_constant_lr_ratio.
    """

    step: int
    total: int
    warmup: int
    peak: float
    floor: float
    settles: float
    options: Options

    @property
    def progress(self) -> float:
        """Share of the steps after the warmup that are done, from 0 to 1."""
        return (self.step - self.warmup) / max(1, self.total - self.warmup)


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule.

    rate: the learning rate as a multiple of the peak. options: what lr_scheduler_kwargs may name -> its type.
    mistakes: what is wrong with options of the right types, given the peak. own_warmup: `rate` is the warmup's too,
    which is linear from 0 for every other schedule.
    """

    rate: Callable[[SchedulePoint], float]
    options: Mapping[str, type] = field(default_factory=dict)
    mistakes: Callable[[Options, float], Mistakes] = lambda options, peak: {}
    own_warmup: bool = False


def multiplier(
    shape: ScheduleShape,
    step: int,
    *,
    total: int,
    warmup: int,
    peak: float,
    floor: float,
    settles: float,
    options: Options,
    quadratic_warmup: bool = False,
) -> float:
    """Return the learning rate of the update after `step` updates, as a multiple of `peak`.

    Linear from 0 over the warmup (so that the first warmup step does not move the weights), or the square of that, then
    with t = (step - warmup) / (total - warmup):

        constant               1
        linear                 1 - t
        cosine                 m + (1 - m) (1 + cos(2 pi c t)) / 2, m = `floor`, c = num_cycles (1/2);
                               t = 1 from `settles` of all steps on
        cosine_with_min_lr     the same, with m = min_lr_rate or min_lr / peak
        cosine_warmup_with_min_lr   the same, one step ahead in warmup and cosine; the warmup begins at
                               warmup_lr_rate, or at 1 / warmup
        cosine_with_restarts   (1 + cos(pi frac(n t))) / 2, n = num_cycles, 0 at the end
        polynomial             e + (1 - e) (1 - t)^power, e = lr_end / peak
        inverse_sqrt           1 / sqrt((step - warmup + s) / s), s = timescale or warmup or 10,000
        warmup_stable_decay    1 until num_decay_steps before the end, then down to min_lr_ratio
        rex                    m + (1 - m) z / (0.1 + 0.9 z), z = 1 - t one step ahead, m = `floor`, as its warmup is
    """
    row = SCHEDULES[shape]
    if step < warmup and not row.own_warmup:
        return (step / warmup) ** (2 if quadratic_warmup else 1)
    return row.rate(SchedulePoint(step, total, warmup, peak, floor, settles, options))


def option_mistakes(shape: ScheduleShape, options: Options, peak: float) -> Mistakes:
    """The mistakes in options of the right types, by the option's name, or under "" for all of them."""
    row = SCHEDULES[shape]
    numbers = [name for name, kind in row.options.items() if kind is not str]
    negative = {
        name: f"{name} is {options[name]}, but must be at least 0." for name in numbers if options.get(name, 0) < 0
    }
    return negative | row.mistakes(options, peak)


def _linear(at: SchedulePoint) -> float:
    return max(0.0, 1.0 - at.progress)


def _cosine_to(floor: float, at: SchedulePoint) -> float:
    last = int(at.total * at.settles)
    t = min(1.0, (min(at.step, last) - at.warmup) / max(1, last - at.warmup))
    cycles = at.options.get("num_cycles", 0.5)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * t))


def _cosine(at: SchedulePoint) -> float:
    return _cosine_to(at.floor, at)


def _cosine_with_min_lr(at: SchedulePoint) -> float:
    options = at.options
    return _cosine_to(options["min_lr_rate"] if "min_lr_rate" in options else options["min_lr"] / at.peak, at)


def _one_lowest_rate(options: Options, peak: float) -> Mistakes:
    if ("min_lr" in options) == ("min_lr_rate" in options):
        return {"": "this schedule needs min_lr or min_lr_rate in lr_scheduler_kwargs, one of them."}
    return {}


def _cosine_warmup_with_min_lr(at: SchedulePoint) -> float:
    options = at.options
    floor = options["min_lr_rate"] if "min_lr_rate" in options else options["min_lr"] / at.peak
    if at.step < at.warmup:
        first = options.get("warmup_lr_rate")
        if first is None:
            return (at.step + 1) / at.warmup
        return first + (1.0 - first) * at.step / max(1, at.warmup - 1)
    t = (at.step - at.warmup + 1) / max(1, at.total - at.warmup)
    wave = 0.5 * (1.0 + math.cos(2.0 * math.pi * options.get("num_cycles", 0.5) * t))
    return floor + (1.0 - floor) * wave


def _rex(at: SchedulePoint) -> float:
    """Chen et al., arXiv:2107.04197. Axolotl's begins at its step 1, so that the last update has the lowest rate."""
    done = at.step + 1
    if done <= at.warmup:
        return done / at.warmup
    if done >= at.total:
        return at.floor
    z = (at.total - done) / (at.total - at.warmup)
    return at.floor + (1.0 - at.floor) * z / (0.1 + 0.9 * z)


def _cosine_with_restarts(at: SchedulePoint) -> float:
    t = at.progress
    return 0.0 if t >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (at.options.get("num_cycles", 1) * t % 1.0)))


def _polynomial(at: SchedulePoint) -> float:
    end = at.options.get("lr_end", _LR_END) / at.peak
    return end + (1.0 - end) * max(0.0, 1.0 - at.progress) ** at.options.get("power", 1.0)


_LR_END = 1e-7  # transformers' default


def _falls_from_the_peak(options: Options, peak: float) -> Mistakes:
    end = options.get("lr_end", _LR_END)
    if end < peak:
        return {}
    message = (
        f"polynomial falls to lr_end, {end:g}, from learning_rate, {peak:g}: set a lower lr_end in lr_scheduler_kwargs."
    )
    return {"lr_end" if "lr_end" in options else "": message}


def _inverse_sqrt(at: SchedulePoint) -> float:
    scale = at.options.get("timescale") or at.warmup or 10_000
    return 1.0 / math.sqrt((at.step - at.warmup + scale) / scale)


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: 0.5 * (1.0 - math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1.0 - math.sqrt(1.0 - t),
}


def _warmup_stable_decay(at: SchedulePoint) -> float:
    """Hägele et al., arXiv:2405.18392."""
    options, step, warmup = at.options, at.step, at.warmup
    lowest: float = options.get("min_lr_ratio", 0.0)
    decay = options["num_decay_steps"]
    stable = options.get("num_stable_steps", at.total - warmup - decay)
    if step < warmup:
        factor = _RISES[options.get("warmup_type", "linear")](step / warmup)
    elif step < warmup + stable:
        return 1.0
    elif step < warmup + stable + decay:
        t = (step - warmup - stable) / decay
        cycles = 2.0 * math.pi * options.get("num_cycles", 0.5)
        falls = {"linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(cycles * t)), "1-sqrt": 1.0 - math.sqrt(t)}
        factor = falls[options.get("decay_type", "cosine")]
    else:
        return lowest
    return factor * (1.0 - lowest) + lowest


def _decays_in_a_known_way(options: Options, peak: float) -> Mistakes:
    wrong: Mistakes = {}
    if "num_decay_steps" not in options:
        wrong[""] = "warmup_stable_decay needs lr_scheduler_kwargs: {num_decay_steps: ...}."
    for name in ("warmup_type", "decay_type"):
        if options.get(name, "linear") not in _RISES:
            wrong[name] = f"{name} is '{options[name]}', but must be one of: {', '.join(_RISES)}."
    return wrong


SCHEDULES: dict[str, ScheduleRow] = {
    "constant": ScheduleRow(lambda at: 1.0),
    "linear": ScheduleRow(_linear),
    "cosine": ScheduleRow(_cosine, {"num_cycles": float}),
    "cosine_with_restarts": ScheduleRow(_cosine_with_restarts, {"num_cycles": int}),
    "cosine_with_min_lr": ScheduleRow(
        _cosine_with_min_lr, {"min_lr": float, "min_lr_rate": float, "num_cycles": float}, _one_lowest_rate
    ),
    "cosine_warmup_with_min_lr": ScheduleRow(
        _cosine_warmup_with_min_lr,
        {"min_lr": float, "min_lr_rate": float, "num_cycles": float, "warmup_lr_rate": float},
        _one_lowest_rate,
        own_warmup=True,
    ),
    "polynomial": ScheduleRow(_polynomial, {"lr_end": float, "power": float}, _falls_from_the_peak),
    "inverse_sqrt": ScheduleRow(_inverse_sqrt, {"timescale": int}),
    "warmup_stable_decay": ScheduleRow(
        _warmup_stable_decay,
        {
            "num_decay_steps": int, "num_stable_steps": int, "warmup_type": str, "decay_type": str,
            "min_lr_ratio": float, "num_cycles": float,
        },
        _decays_in_a_known_way,
        own_warmup=True,
    ),
    "rex": ScheduleRow(_rex, own_warmup=True),
}  # fmt: skip
assert tuple(SCHEDULES) == get_args(ScheduleShape)
