"""The shapes of the learning rate: what lr_scheduler_kwargs may name for each, and each as a pure function.

Names and values are those of transformers' get_scheduler, so that curves of other tools can be laid over ours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Shape = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip

ARGUMENTS: dict[str, dict[str, type]] = {
    "constant": {},
    "linear": {},
    "cosine": {"num_cycles": float},
    "cosine_with_restarts": {"num_cycles": int},
    "cosine_with_min_lr": {"min_lr": float, "min_lr_rate": float, "num_cycles": float},
    "polynomial": {"lr_end": float, "power": float},
    "inverse_sqrt": {"timescale": int},
    "warmup_stable_decay": {
        "num_decay_steps": int,
        "num_stable_steps": int,
        "warmup_type": str,
        "decay_type": str,
        "min_lr_ratio": float,
        "num_cycles": float,
    },
}
assert tuple(ARGUMENTS) == get_args(Shape)

RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: 0.5 * (1.0 - math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1.0 - math.sqrt(1.0 - t),
}


def multiplier(
    shape: Shape, step: int, *, total: int, warmup: int, peak: float, floor: float, settles: float, options: Mapping
) -> float:
    """Learning rate of the update after `step` updates, as a multiple of `peak`.

    Linear from 0 over the warmup (so the first warmup step does not move the weights), then with
    t = (step - warmup) / (total - warmup):

        constant               1
        linear                 1 - t
        cosine                 m + (1 - m) (1 + cos(2 pi c t)) / 2, m = `floor`, c = num_cycles (1/2);
                               t = 1 from `settles` of all steps on
        cosine_with_min_lr     the same, with m = min_lr_rate or min_lr / peak
        cosine_with_restarts   (1 + cos(pi frac(n t))) / 2, n = num_cycles, 0 at the end
        polynomial             e + (1 - e) (1 - t)^power, e = lr_end / peak
        inverse_sqrt           1 / sqrt((step - warmup + s) / s), s = timescale or warmup or 10,000
        warmup_stable_decay    1 until num_decay_steps before the end, then down to min_lr_ratio
    """
    if shape == "warmup_stable_decay":
        return _warmup_stable_decay(step, total, warmup, options)
    if step < warmup:
        return step / warmup
    t = (step - warmup) / max(1, total - warmup)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return max(0.0, 1.0 - t)
    if shape == "inverse_sqrt":
        scale = options.get("timescale") or warmup or 10_000
        return 1.0 / math.sqrt((step - warmup + scale) / scale)
    if shape == "polynomial":
        end = options.get("lr_end", 1e-7) / peak
        return end + (1.0 - end) * max(0.0, 1.0 - t) ** options.get("power", 1.0)
    if shape == "cosine_with_restarts":
        return 0.0 if t >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (options.get("num_cycles", 1) * t % 1.0)))
    if shape == "cosine_with_min_lr":
        floor = options["min_lr_rate"] if "min_lr_rate" in options else options["min_lr"] / peak
    last = int(total * settles)
    t = min(1.0, (min(step, last) - warmup) / max(1, last - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(2.0 * math.pi * options.get("num_cycles", 0.5) * t))


def _warmup_stable_decay(step: int, total: int, warmup: int, options: Mapping) -> float:
    """Hägele et al., arXiv:2405.18392."""
    lowest: float = options.get("min_lr_ratio", 0.0)
    decay = options["num_decay_steps"]
    stable = options.get("num_stable_steps", total - warmup - decay)
    if step < warmup:
        factor = RISES[options.get("warmup_type", "linear")](step / warmup)
    elif step < warmup + stable:
        return 1.0
    elif step < warmup + stable + decay:
        t = (step - warmup - stable) / decay
        kind = options.get("decay_type", "cosine")
        cycles = 2.0 * math.pi * options.get("num_cycles", 0.5)
        falls = {"linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(cycles * t)), "1-sqrt": 1.0 - math.sqrt(t)}
        factor = falls[kind]
    else:
        return lowest
    return factor * (1.0 - lowest) + lowest


def option_mistakes(shape: Shape, options: Mapping[str, Any], peak: float) -> dict[str, str]:
    """name of an option, or "" for all of them -> what is wrong, for options of the right types."""
    wrong: dict[str, str] = {}
    if shape == "warmup_stable_decay" and "num_decay_steps" not in options:
        wrong[""] = "warmup_stable_decay needs lr_scheduler_kwargs: {num_decay_steps: ...}."
    if shape == "cosine_with_min_lr" and ("min_lr" in options) == ("min_lr_rate" in options):
        wrong[""] = "cosine_with_min_lr needs min_lr or min_lr_rate in lr_scheduler_kwargs, one of them."
    for name in ("warmup_type", "decay_type"):
        if options.get(name, "linear") not in RISES:
            wrong[name] = f"{name} is '{options[name]}', but must be one of: {', '.join(RISES)}."
    for name, kind in ARGUMENTS[shape].items():
        if kind is not str and options.get(name, 0) < 0:
            wrong[name] = f"{name} is {options[name]}, but must be at least 0."
    if shape == "polynomial" and options.get("lr_end", 1e-7) >= peak:
        wrong["lr_end" if "lr_end" in options else ""] = (
            f"polynomial falls to lr_end, {options.get('lr_end', 1e-7):g}, from learning_rate, {peak:g}: set a lower "
            "lr_end in lr_scheduler_kwargs."
        )
    return wrong
