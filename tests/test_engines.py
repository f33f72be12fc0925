"""Every engine gives the numbers of one rank, and is the one that was asked for."""

import json
from pathlib import Path

import pytest
from conftest import alpaca_rows, run_command, write_rows

from finetuner.errors import PlanError
from finetuner.plan import Plan
from finetuner.recipe import load_recipe
from finetuner.world import World


def zero(stage: int) -> str:
    return f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "engine"),
    [
        ("fsdp=[full_shard, auto_wrap]", "FSDP2 over 2 ranks"),
        (zero(1), "ZeRO-1"),
        (zero(2), "ZeRO-2"),
        (zero(3), "ZeRO-3"),
    ],
    ids=["FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"],
)
def test_two_ranks_of_an_engine_give_the_numbers_of_one(override, engine, write_recipe, train, tmp_path):
    rows = write_rows(tmp_path / "sixteen.jsonl", alpaca_rows(16))
    recipe = write_recipe(
        datasets=[{"path": str(rows), "type": "alpaca"}],
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=2e-4,
        bf16=False,
        adapter="lora",
        lora_r=4,
    )
    one = train(recipe, f"output_dir={tmp_path / 'one'}", "gradient_accumulation_steps=4")
    done = run_command("finetuner.train", recipe, f"output_dir={tmp_path / 'two'}", override, ranks=2)
    assert done.code == 0, done.text
    assert engine in done.out
    two = [row for row in metrics(tmp_path / "two") if "loss" in row]
    assert len(two) == 3
    for here, there in zip(two, one, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-5)
        assert here["learning_rate"] == there["learning_rate"]
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()


def test_moments_in_8_bits_under_zero_are_refused_by_name(write_recipe):
    recipe = load_recipe(write_recipe(optimizer="adamw_bnb_8bit", deepspeed={"zero_optimization": {"stage": 1}}))
    with pytest.raises(PlanError, match="adamw_bnb_8bit with deepspeed is not supported yet"):
        Plan.from_recipe(recipe, World(size=2))
