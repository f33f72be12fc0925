"""Tokens, FLOPs, hours and memory of a run, before it costs anything: arithmetic alone, without torch.

FLOPs are the model's own (see plan/flops.py); hours assume that training reaches a given share of a device's peak.
"""

from dataclasses import asdict, dataclass
from typing import Any

from finetuner.errors import PlanError
from finetuner.plan.flops import TrainingFlops, known_devices, parts_of_shape, peak_of, training_flops_of_shape
from finetuner.plan.memory import ModelBytes, RankBytes, bytes_of_a_rank, bytes_of_training
from finetuner.plan.run import Plan
from finetuner.recipe.gpt_shape import shape_of, tensors_of_shape
from finetuner.recipe.sections import GPTSection, OptimizerSection, ScheduleSection

SHOWN_WITHOUT_CHOICE = ("A100", "H100", "B200")  # devices whose times are stated if none is named


@dataclass(frozen=True)
class Devices:
    """Devices to plan for: `count` of a kind. `peak_flops`: FLOPs a second of one, None where it is not known."""

    count: int
    name: str = ""
    peak_flops: float | None = None


@dataclass(frozen=True)
class ModelCost:
    """Parameters by part, and the bytes of the full model and of what trains it.

    `work`: FLOPs a token; None where no formula holds for the architecture."""

    title: str
    parameters_by_part: dict[str, int]
    work: TrainingFlops | None
    memory: ModelBytes

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters_by_part.values())


@dataclass(frozen=True)
class RunLength:
    """Tokens of all steps; `exact` if the rows are known to be full."""

    num_tokens: int
    num_steps: int
    exact: bool


@dataclass(frozen=True)
class DeviceTime:
    """Seconds of the run on devices of one kind, of which each has this peak in FLOPs a second."""

    device: str
    peak_flops: float
    seconds: float


@dataclass(frozen=True)
class TrainingCost:
    """Cost of one run. `length` and `flops` are None where only the prepared rows, or no formula, could say."""

    model: ModelCost
    length: RunLength | None
    flops: float | None
    times: tuple[DeviceTime, ...]
    rank_memory: RankBytes
    num_devices: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the names that `finetuner plan --json` prints."""
        return {
            "parameters": self.model.num_parameters,
            "parts": self.model.parameters_by_part,
            "tokens": self.length and self.length.num_tokens,
            "steps": self.length and self.length.num_steps,
            "tokens_per_parameter": self.length and self.length.num_tokens / self.model.num_parameters,
            "flops": self.flops,
            "devices": self.num_devices,
            "seconds": {time.device: time.seconds for time in self.times},
            "bytes": asdict(self.model.memory),
            "bytes_of_a_rank": asdict(self.rank_memory),
        }


def training_cost(
    model: ModelCost, length: RunLength | None, plan: Plan, devices: Devices, *, sequence_len: int, utilization: float
) -> TrainingCost:
    """Return the cost of training `model` for `length`. `utilization`: share of the peak that training reaches."""
    flops = None
    if model.work is not None and length is not None:
        flops = model.work.flops_of_rows(length.num_tokens, sequence_len)
    times = () if flops is None else training_times(flops, devices, utilization)
    return TrainingCost(model, length, flops, times, bytes_of_a_rank(model.memory, plan.parallel), devices.count)


def parse_devices(text: str, peak_flops: float | None) -> Devices:
    """Parse "8", "H100" or "8xH100". `peak_flops`: of each, instead of its data sheet's.

    Raises PlanError for a device of unknown speed."""
    number, times, name = text.partition("x")
    if not times or not number.isdecimal():
        number, name = (text, "") if text.isdecimal() else ("1", text)
    if int(number) < 1:
        raise PlanError(f"--devices {text}: a run needs one device at least.")
    peak = peak_flops or (peak_of(name) if name else None)
    if name and peak is None:
        raise PlanError(
            f"--devices {text}: how fast {name} is, is not known here. Say it (--flops 312e12, in the number format of "
            f"the run), or take one of: {', '.join(known_devices())}."
        )
    return Devices(int(number), name or ("device" if peak_flops else ""), peak)


def run_length(section: ScheduleSection, plan: Plan, *, sequence_len: int, streaming: bool) -> RunLength | None:
    """Return the tokens and steps of a run; None where only the prepared rows could say."""
    per_step = plan.global_batch * sequence_len
    if section.max_tokens is not None:
        left_out = plan.ramp.left_out * sequence_len
        steps = -(-(section.max_tokens + left_out) // per_step)
        plan.ramp.require_steps(steps)
        return RunLength(section.max_tokens, steps, streaming)
    if section.max_steps is not None:
        return RunLength(plan.rows_before(section.max_steps) * sequence_len, section.max_steps, streaming)
    return None


def scratch_model_cost(block: GPTSection, vocabulary: int, plan: Plan, optimizer: OptimizerSection) -> ModelCost:
    """Return the cost of a model from scratch, all of which is trained. `vocabulary`: tokens of its tokenizer."""
    shape = shape_of(block)
    by_part = parts_of_shape(shape, vocabulary)
    title = (
        f"{block.preset or 'from scratch'}: {shape.layers} layers, {shape.heads} heads, width {shape.width}, inside "
        f"the MLPs {shape.mlp_width}, context {shape.context:,}, vocabulary {vocabulary:,}"
    )
    tensors = tensors_of_shape(shape, vocabulary)
    memory = bytes_of_training(tensors, optimizer, parallel=plan.parallel, bf16=plan.precision == "bf16")
    return ModelCost(title, by_part, training_flops_of_shape(shape, vocabulary), memory)


def training_times(flops: float, devices: Devices, utilization: float) -> tuple[DeviceTime, ...]:
    """Return seconds = FLOPs / (devices x peak x utilization): of the devices named, or of some that are known."""
    if devices.peak_flops is not None:
        chosen = [(devices.name, devices.peak_flops)]
    else:
        chosen = [(name, peak_of(name) or 0.0) for name in SHOWN_WITHOUT_CHOICE]
    return tuple(DeviceTime(name, peak, flops / (devices.count * peak * utilization)) for name, peak in chosen)
