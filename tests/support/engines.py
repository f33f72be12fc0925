"""Every engine as recipe keys; runs on two ranks, what they say they hold, and their numbers compared."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.processes import Result, run_command


def zero(stage: int, **block: object) -> dict:
    return {"deepspeed": {"zero_optimization": {"stage": stage, "overlap_comm": stage == 1, **block}}}


ENGINES: dict[str, dict] = {
    "DDP": {},
    "FSDP2": {"fsdp": ["full_shard", "auto_wrap"]},
    "FSDP2 offloaded": {
        "fsdp": ["full_shard", "auto_wrap"],
        "fsdp_config": {"fsdp_offload_params": True, "fsdp_cpu_ram_efficient_loading": True},
    },
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
}


@dataclass(frozen=True)
class Holds:
    """The run's own words on what its ranks hold: elements, as (least, most) over the ranks."""

    engine: str
    parameters: tuple[int, int]
    updated: tuple[int, int]
    trained: int
    total: int


def holds(text: str) -> Holds:
    def numbers(pattern: str) -> list[int]:
        found = re.search(pattern, text)
        assert found, text
        return [int(n.replace(",", "")) for n in found.groups() if n]

    held = numbers(r"each rank holds +([\d,]+)(?: to ([\d,]+))? parameters")
    updated = numbers(r"parameters, ([\d,]+)(?: to ([\d,]+))? updated by it")
    trained, total = numbers(r"parameters +([\d,]+) trained of ([\d,]+)")
    engine = re.search(r"engine +(.+?) *\n", text)
    assert engine
    return Holds(engine[1], (held[0], held[-1]), (updated[0], updated[-1]), trained, total)


def assert_real(name: str, text: str, whole: int = 0) -> None:
    """On two ranks: the engine says its name, and a rank holds no more than its part (which ZeRO pads).

    `whole`: elements that one rank alone holds, where they are fewer than the model's: 4-bit weights are two to one.
    """
    found = holds(text)
    whole = whole or found.total
    word, _, rest = name.partition(" ")
    assert found.engine.startswith(f"{word} over 2 ranks") and ("offloaded" in found.engine) == ("offloaded" in rest)
    if word == "DDP":
        assert found.parameters == (whole, whole) and found.updated == (found.trained, found.trained)
        return
    if word in ("ZeRO-1", "ZeRO-2"):
        assert found.parameters == (whole, whole)
    else:
        assert whole <= sum(found.parameters) <= whole + 500
    assert found.trained <= sum(found.updated) <= found.trained + 500
    assert max(found.updated) < 0.7 * found.trained


def override(**keys: object) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def run_ranks(recipe: Path, out: Path, *overrides: str, ranks: int = 2) -> Result:
    done = run_command("finetuner.train", recipe, f"output_dir={out}", *overrides, ranks=ranks)
    assert done.code == 0, done.text
    return done


COMPARED = {"loss": 1e-5, "grad_norm": 1e-5, "learning_rate": 0.0, "num_tokens": 0.0, "eval_loss": 1e-5}


def assert_same_numbers(rows: list[dict], reference: list[dict]) -> None:
    assert len(rows) == len(reference)
    for row, expected in zip(rows, reference, strict=True):
        for key, bound in COMPARED.items():
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=bound, abs=0.0), (key, row["step"])
