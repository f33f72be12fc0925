"""`finetuner plan`: tokens, FLOPs, hours and memory of a run, before it costs anything.

For a model from scratch torch is not needed; of a base model its config.json is read, and no weight.
"""

import json
from typing import Annotated

import typer

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.console import Screen
from finetuner.data.tokenizer import load_tokenizer
from finetuner.data.tokenizer_source import resolve_tokenizer
from finetuner.errors import ModelError
from finetuner.estimate.training_cost import (
    Devices,
    ModelCost,
    RunLength,
    TrainingCost,
    parse_devices,
    run_length,
    scratch_model_cost,
    training_cost,
)
from finetuner.plan.flops import CHINCHILLA
from finetuner.plan.run import Plan
from finetuner.recipe import Recipe, load
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.sections import NewTokenizer
from finetuner.world import World

_BYTE_TOKENS = 257  # tokens of `tokenizer: byte`


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    devices: Annotated[str, typer.Option(help="How many, of which kind: 8, or 8xH100.")] = "1",
    flops: Annotated[
        float | None, typer.Option(help="FLOPs a second of one device, such as 312e12.", show_default=False)
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="The share of it that training reaches.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Print the cost of a run, as a table or as JSON. Raises FinetunerError."""
    loaded = load(recipe, overrides or [], check_files=False)
    values, screen = loaded.recipe, Screen(enabled=not as_json)
    chosen = parse_devices(devices, flops or values.output.device_peak_flops)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    batches = Plan.from_recipe(values, _world_of(chosen))
    data = values.data
    cost = training_cost(
        _model_cost(values, batches),
        run_length(values.schedule, batches, sequence_len=data.sequence_len, streaming=data.streaming),
        batches,
        chosen,
        sequence_len=data.sequence_len,
        utilization=mfu,
    )
    if as_json:
        typer.echo(json.dumps(cost.as_dict(), indent=1))
    else:
        screen.table(
            [
                ("recipe", recipe),
                ("model", cost.model.title),
                *_parameter_rows(cost.model),
                ("global batch", f"{batches.batch_equation}, {data.sequence_len:,} tokens at most in each"),
                *_length_rows(cost.model, cost.length, from_scratch=values.model.base_model == FROM_SCRATCH),
                *_flops_rows(cost, data.sequence_len),
                *_time_rows(cost, chosen.count, mfu),
                ("memory", _memory_line(cost, batches)),
            ]
        )


def _world_of(devices: Devices) -> World:
    """Nodes of up to eight GPUs, whatever this machine has."""
    return World(size=devices.count, local_size=min(8, devices.count), device="cuda", bf16=True)


def _model_cost(recipe: Recipe, batches: Plan) -> ModelCost:
    block = recipe.model.model
    if recipe.model.base_model == FROM_SCRATCH:
        assert block is not None, "a rule asks for the block"
        vocabulary = block.vocabulary or _vocabulary(recipe)
        return scratch_model_cost(block, vocabulary, batches, recipe.optimizer)
    from finetuner.estimate.base_model_cost import base_model_cost  # imports torch

    return base_model_cost(recipe, batches)


def _vocabulary(recipe: Recipe) -> int:
    """Tokens of the tokenizer, which is made or read only where the recipe does not say them."""
    section = recipe.tokenizer
    adds = bool(section.tokens or section.special_tokens.model_dump(exclude_none=True))
    if section.tokenizer == "byte" and not adds:
        return _BYTE_TOKENS
    if isinstance(section.tokenizer, NewTokenizer) and not adds:
        return section.tokenizer.train.vocab_size
    try:
        name = resolve_tokenizer(recipe.tokenizer, recipe.data, World()) or recipe.model.base_model
        return len(load_tokenizer(section, name, recipe.model.trust_remote_code).tokenizer)
    except ModelError as error:
        raise ModelError(f"{error}\nOr say how many tokens it has: model.vocabulary=50304") from error


def _parameter_rows(model: ModelCost) -> list[tuple[str, str]]:
    counts = {name: count for name, count in model.parameters_by_part.items() if count}
    tied = " (also the head)" if "head" not in counts else ""
    return [
        ("parameters", f"{model.num_parameters:,}"),
        *(
            (f"  {name}", f"{count:,}  {count / model.num_parameters:.1%}{tied if name == 'embedding' else ''}")
            for name, count in counts.items()
        ),
    ]


def _length_rows(model: ModelCost, length: RunLength | None, *, from_scratch: bool) -> list[tuple[str, str]]:
    if length is None:
        return [("tokens", "known when the rows are prepared; to plan with a number: max_tokens=300M")]
    about = "" if length.exact else ", if every row is full"
    rows = [("tokens", f"{length.num_tokens:,} in {length.num_steps:,} steps{about}")]
    if from_scratch:
        ratio = length.num_tokens / model.num_parameters
        rows.append(
            (
                "tokens a parameter",
                f"{ratio:.3g}; about {CHINCHILLA}, which are {CHINCHILLA * model.num_parameters:,} tokens here, make "
                "the best of a number of FLOPs (Hoffmann et al. 2022, arXiv:2203.15556)",
            )
        )
    return rows


def _flops_rows(cost: TrainingCost, sequence_len: int) -> list[tuple[str, str]]:
    work = cost.model.work
    if work is None:
        return [("FLOPs", "no formula holds for this architecture (experts, short windows, or no attention)")]
    if cost.flops is None:
        return []
    matrices, attention = work.per_token + work.per_trained, work.per_pair * sequence_len
    return [
        (
            "FLOPs",
            f"{cost.flops:.3g} = tokens x ({matrices / 1e6:,.1f}M for matrices + {attention / 1e6:,.1f}M for "
            f"attention): 6 a trained weight, 4 a frozen one; 6 x layers x width x {sequence_len:,}",
        )
    ]


def _time_rows(cost: TrainingCost, count: int, utilization: float) -> list[tuple[str, str]]:
    return [
        (
            f"on {count} x {time.device}",
            f"{readable_duration(time.seconds)}, at {utilization:.0%} of {time.peak_flops / 1e12:,.4g} TFLOP/s",
        )
        for time in cost.times
    ]


def _memory_line(cost: TrainingCost, batches: Plan) -> str:
    full, rank = cost.model.memory, cost.rank_memory
    total = f"weights {_gb(full.weights)}, gradients {_gb(full.gradients)}, optimizer {_gb(full.optimizer)}"
    sharded = (
        "" if batches.parallel.is_replicated else f"; with {batches.parallel.name} each rank keeps {_gb(rank.device)}"
    )
    host = f" and {_gb(rank.host)} in its node's RAM" if rank.host else ""
    return f"{total} in all{sharded}{host}; activations come on top"


def readable_duration(seconds: float) -> str:
    """Return a duration in its natural unit, such as "2.5 days"."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
