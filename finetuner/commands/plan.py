"""`finetuner plan`: what a run will compute, how long that takes and what it keeps in memory, before it costs anything.

Of a model from scratch torch is not needed for it; of another one, its config.json is read and no weight.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuner.console import Screen
from finetuner.errors import ModelError, PlanError
from finetuner.plan.flops import CHINCHILLA, Work, known_devices, parts_of_shape, peak_of, work_of_shape
from finetuner.plan.memory import Kept, Parts, kept_by_a_rank, trained_parts
from finetuner.plan.run import Plan
from finetuner.recipe import Loaded, Recipe
from finetuner.recipe.gpt_shape import FROM_SCRATCH, shape_of
from finetuner.recipe.sections import NewTokenizer
from finetuner.world import World

_SHOWN_WITHOUT_CHOICE = ("A100", "H100", "B200")
_BYTES = 257  # tokens of `tokenizer: byte`


@dataclass(frozen=True)
class Devices:
    """What the run is planned on: `count` of a kind, whose `peak` in FLOPs a second is None if it is not known."""

    count: int
    name: str = ""
    peak: float | None = None


@dataclass(frozen=True)
class Model:
    """`work` is None where no formula holds; `bytes_kept` are of the whole model and of what trains it."""

    title: str
    parts: dict[str, int]
    work: Work | None
    bytes_kept: Parts

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Length:
    """Tokens of the run in all; `exact` if its rows are known to be full."""

    tokens: int
    steps: int
    exact: bool


def plan(loaded: Loaded, recipe_name: str, devices: Devices, utilisation: float, *, as_json: bool) -> None:
    """Print the plan. Raises FinetunerError."""
    recipe, screen = loaded.recipe, Screen(speaks=not as_json)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    batches = Plan.from_recipe(
        recipe, World(size=devices.count, local_size=min(8, devices.count), device="cuda", bf16=True)
    )
    begun = recipe.model.base_model == FROM_SCRATCH
    model = _begun(recipe, batches) if begun else _read(recipe, batches)
    length = length_of(recipe, batches)
    kept = kept_by_a_rank(model.bytes_kept, batches.engine)
    flops = None
    if model.work is not None and length is not None:
        flops = model.work.flops_of_rows(length.tokens, recipe.data.sequence_len)
    times = _times(flops, devices, utilisation)
    if as_json:
        print(json.dumps(_as_dict(model, length, flops, times, kept, devices), indent=1))
        return
    rows = [("recipe", recipe_name), ("model", model.title), *_part_rows(model)]
    rows += [("global batch", f"{batches.batch_equation}, {recipe.data.sequence_len:,} tokens at most in each")]
    rows += _length_rows(recipe, model, length, begun=begun)
    rows += _flops_rows(model, length, flops, recipe.data.sequence_len)
    rows += [
        (f"on {devices.count} x {name}", f"{span(seconds)}, at {utilisation:.0%} of {peak / 1e12:,.4g} TFLOP/s")
        for name, peak, seconds in times
    ]
    rows.append(("memory", _memory_line(model.bytes_kept, kept, batches)))
    screen.table(rows)


def devices_of(text: str, flops: float | None) -> Devices:
    """ "8", "H100" or "8xH100"; `flops`: FLOPs a second of each. Raises PlanError for a device of unknown speed."""
    number, times, name = text.partition("x")
    if not times or not number.isdecimal():
        number, name = (text, "") if text.isdecimal() else ("1", text)
    if int(number) < 1:
        raise PlanError(f"--devices {text}: a run needs one device at least.")
    peak = flops or (peak_of(name) if name else None)
    if name and peak is None:
        raise PlanError(
            f"--devices {text}: how fast {name} is, is not known here. Say it (--flops 312e12, in the number format of "
            f"the run), or take one of: {', '.join(known_devices())}."
        )
    return Devices(int(number), name or ("device" if flops else ""), peak)


def length_of(recipe: Recipe, plan: Plan) -> Length | None:
    """None where it takes the prepared rows to know."""
    section = recipe.schedule
    per_step = plan.global_batch * recipe.data.sequence_len
    if section.max_tokens is not None:
        left_out = plan.ramp.left_out * recipe.data.sequence_len
        steps = -(-(section.max_tokens + left_out) // per_step)
        plan.ramp.require_steps(steps)
        return Length(section.max_tokens, steps, recipe.data.streaming)
    if section.max_steps is not None:
        tokens = plan.rows_before(section.max_steps) * recipe.data.sequence_len
        return Length(tokens, section.max_steps, recipe.data.streaming)
    return None


def _begun(recipe: Recipe, plan: Plan) -> Model:
    assert recipe.model.model is not None, "a rule asks for the block"
    shape = shape_of(recipe.model.model)
    vocabulary = shape.vocabulary or _vocabulary(recipe)
    parts = parts_of_shape(shape, vocabulary)
    title = (
        f"{recipe.model.model.preset or 'from scratch'}: {shape.layers} layers, {shape.heads} heads, width "
        f"{shape.width}, inside the MLPs {shape.mlp_width}, context {shape.context:,}, vocabulary {vocabulary:,}"
    )
    kept = trained_parts(
        sum(parts.values()),
        engine=plan.engine,
        bf16=plan.precision == "bf16",
        optimizer=recipe.optimizer.optimizer,
    )
    return Model(title, parts, work_of_shape(shape, vocabulary), kept)


def _vocabulary(recipe: Recipe) -> int:
    """Tokens of the tokenizer, which is made or read only where the recipe does not say them."""
    section = recipe.tokenizer
    adds = bool(section.tokens or section.special_tokens.model_dump(exclude_none=True))
    if section.tokenizer == "byte" and not adds:
        return _BYTES
    if isinstance(section.tokenizer, NewTokenizer) and not adds:
        return section.tokenizer.train.vocab_size
    from finetuner.data.tokenizer import load_tokenizer
    from finetuner.data.tokenizer_source import resolve_tokenizer

    try:
        name = resolve_tokenizer(section, recipe.data, World()) or recipe.model.base_model
        return len(load_tokenizer(section, name, recipe.model.trust_remote_code).tokenizer)
    except ModelError as error:
        raise ModelError(f"{error}\nOr say how many tokens it has: model.vocabulary=50304") from error


def _read(recipe: Recipe, plan: Plan) -> Model:
    from finetuner.estimate.fit import model_without_weights, parts_to_keep
    from finetuner.models.attention import choose_attention
    from finetuner.models.load import train_only
    from finetuner.models.model_flops import parts_of, work_of

    name = recipe.model.base_model
    model = model_without_weights(recipe, plan, choose_attention("sdpa", World(), plan.precision))
    if model is None:
        where = (
            "" if Path(name).is_dir() else f" (no folder of that name in {Path.cwd()}, so it was taken for a hub id)"
        )
        raise ModelError(
            f"the config.json of '{name}'{where} cannot be read, or names no causal language model that transformers "
            "knows."
        )
    if recipe.adapter.adapter is not None:
        model.requires_grad_(False)
        how = f"{recipe.adapter.adapter}, rank {recipe.adapter.lora_r}: it comes on top of these"
    else:
        train_only(model, recipe.adapter.unfrozen_parameters)
        how = "all trained" if recipe.adapter.unfrozen_parameters is None else "trained as unfrozen_parameters says"
    title = f"{name} ({type(model).__name__}), {how}"
    work = work_of(model, model, recipe.data.sequence_len)
    return Model(title, parts_of(model), work, parts_to_keep(recipe, plan, model))


def _times(flops: float | None, devices: Devices, utilisation: float) -> list[tuple[str, float, float]]:
    """(device, its peak, seconds)"""
    if flops is None:
        return []
    if devices.peak is not None:
        chosen = [(devices.name, devices.peak)]
    else:
        chosen = [(name, peak_of(name) or 0.0) for name in _SHOWN_WITHOUT_CHOICE]
    return [(name, peak, flops / (devices.count * peak * utilisation)) for name, peak in chosen]


def _part_rows(model: Model) -> list[tuple[str, str]]:
    there = {name: count for name, count in model.parts.items() if count}
    tied = " (also the head)" if "head" not in there else ""
    return [
        ("parameters", f"{model.parameters:,}"),
        *(
            (f"  {name}", f"{count:,}  {count / model.parameters:.1%}{tied if name == 'embedding' else ''}")
            for name, count in there.items()
        ),
    ]


def _length_rows(recipe: Recipe, model: Model, length: Length | None, *, begun: bool) -> list[tuple[str, str]]:
    if length is None:
        return [("tokens", "known when the rows are prepared; to plan with a number: max_tokens=300M")]
    about = "" if length.exact else ", if every row is full"
    rows = [("tokens", f"{length.tokens:,} in {length.steps:,} steps{about}")]
    if begun:
        ratio = length.tokens / model.parameters
        rows.append(
            (
                "tokens a parameter",
                f"{ratio:.3g}; about {CHINCHILLA}, which are {CHINCHILLA * model.parameters:,} tokens here, make the "
                "best of a number of FLOPs (Hoffmann et al. 2022, arXiv:2203.15556)",
            )
        )
    return rows


def _flops_rows(model: Model, length: Length | None, flops: float | None, row: int) -> list[tuple[str, str]]:
    if model.work is None:
        return [("FLOPs", "no formula holds for this architecture (experts, short windows, or no attention)")]
    if flops is None or length is None:
        return []
    matrices, attention = model.work.per_token + model.work.per_trained, model.work.per_pair * row
    return [
        (
            "FLOPs",
            f"{flops:.3g} = tokens x ({matrices / 1e6:,.1f}M for matrices + {attention / 1e6:,.1f}M for attention): "
            f"6 a trained weight, 4 a frozen one; 6 x layers x width x {row:,}",
        )
    ]


def _memory_line(parts: Parts, kept: Kept, plan: Plan) -> str:
    whole = f"weights {_gb(parts.weights)}, gradients {_gb(parts.gradients)}, optimizer {_gb(parts.optimizer)}"
    spread = "" if plan.engine is None else f"; with {plan.engine.name} each rank keeps {_gb(kept.device)}"
    host = f" and {_gb(kept.host)} in its node's RAM" if kept.host else ""
    return f"{whole} in all{spread}{host}; activations come on top"


def _as_dict(
    model: Model,
    length: Length | None,
    flops: float | None,
    times: list[tuple[str, float, float]],
    kept: Kept,
    devices: Devices,
) -> dict[str, Any]:
    return {
        "parameters": model.parameters,
        "parts": model.parts,
        "tokens": length and length.tokens,
        "steps": length and length.steps,
        "tokens_per_parameter": length and length.tokens / model.parameters,
        "flops": flops,
        "devices": devices.count,
        "seconds": {name: seconds for name, _, seconds in times},
        "bytes": asdict(model.bytes_kept),
        "bytes_of_a_rank": asdict(kept),
    }


def span(seconds: float) -> str:
    """In the unit that a person would take."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
