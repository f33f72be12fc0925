"""Optimizers, noise and compiled layers mean in every engine what they mean on one rank, or are refused by name."""

from pathlib import Path

import pytest
from support.engines import COMPARED, ENGINES, assert_real, assert_same_numbers, override, run_ranks, zero
from support.results import largest_difference, weights_of
from support.rows import alpaca_rows, write_rows

from finetuner.errors import RecipeError
from finetuner.recipe import load
from finetuner.recipe.optimizers import OPTIMIZERS
from finetuner.training.metrics import read_metrics

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
SPREAD = {
    "FSDP2": ENGINES["FSDP2"],
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "ZeRO-2 offloaded": zero(2, **OFFLOADED),
    "ZeRO-3 offloaded": zero(3, **OFFLOADED, offload_param={"device": "cpu"}),
}


@pytest.fixture
def recipe(write_recipe, tmp_path: Path) -> Path:
    rows = write_rows(tmp_path / "unequal.jsonl", alpaca_rows(80))
    return write_recipe(
        datasets=[{"path": str(rows), "type": "alpaca"}], max_steps=5, warmup_steps=2, weight_decay=0.1, seed=7
    )


UPDATES: dict[str, dict] = {
    "adamw_torch": {"learning_rate": 2e-4},
    "sgd": {"learning_rate": 0.05, "optim_args": {"momentum": 0.9, "nesterov": True}},
    "rmsprop": {"learning_rate": 1e-4, "optim_args": {"momentum": 0.5}},
    "adagrad": {"learning_rate": 1e-3},
    "lion_32bit": {"learning_rate": 1e-4},
    "paged_adamw_32bit": {"learning_rate": 2e-4},
}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        *(("FSDP2", name) for name in ("sgd", "rmsprop", "adagrad")),
        *(("ZeRO-2", name) for name in ("sgd", "rmsprop", "lion_32bit", "paged_adamw_32bit")),
        *(("ZeRO-3", name) for name in ("sgd", "lion_32bit")),
        *((f"ZeRO-{stage} offloaded", name) for stage in (2, 3) for name in ("adamw_torch", "sgd")),
    ],
)
def test_an_optimizer_takes_the_steps_of_one_rank_where_it_is_spread(engine, optimizer, recipe, train, tmp_path):
    keys = {"optimizer": optimizer, **UPDATES[optimizer]}
    reference = train(recipe, *override(**keys, micro_batch_size=4, output_dir=str(tmp_path / "one")))
    done = run_ranks(recipe, tmp_path / "two", *override(**keys, **SPREAD[engine], micro_batch_size=2))
    assert_real(engine, done.out)
    assert_same_numbers(read_metrics(tmp_path / "two" / "metrics.jsonl"), reference)
    if optimizer != "lion_32bit":  # the sign of what is nearly zero hangs on the order of a sum
        assert largest_difference(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 1e-5


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("engine", [name for name in SPREAD if name not in ("FSDP2", "ZeRO-1")])
def test_moments_in_8_bits_are_spread_by_every_zero(engine, recipe, train, tmp_path):
    """Blocks begin elsewhere in a rank's part, so that they are rounded otherwise: equal to 1e-3."""
    keys = {"learning_rate": 1e-3, "optimizer": "adamw_bnb_8bit"}
    reference = train(recipe, *override(**keys, micro_batch_size=4, output_dir=str(tmp_path / "one")))
    done = run_ranks(recipe, tmp_path / "two", *override(**keys, **SPREAD[engine], micro_batch_size=2))
    assert_real(engine, done.out)
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(reference[0]["loss"], rel=COMPARED["loss"])
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in reference], rel=1e-3)
    assert 0 < largest_difference(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 5e-3


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-1", "ZeRO-3"])
def test_noise_and_dropout_are_those_of_ddp_on_as_many_ranks(engine, recipe, tmp_path):
    """They are drawn by (seed, step, rank), so that another number of ranks has others."""
    keys = {"adapter": "lora", "lora_dropout": 0.2, "neftune_noise_alpha": 5.0, "micro_batch_size": 2}
    rows = {}
    for name in ("DDP", engine):
        done = run_ranks(recipe, tmp_path / name, *override(**keys, **ENGINES[name]))
        assert_real(name, done.out)
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert_same_numbers(rows[engine], rows["DDP"])


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_compiled_layers_give_the_numbers_of_one_rank(engine, recipe, train, tmp_path):
    keys = {"adapter": "lora", "gradient_checkpointing": True, "max_steps": 2, "pad_to_sequence_len": True}
    reference = train(recipe, *override(**keys, micro_batch_size=4, output_dir=str(tmp_path / "one")))
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "micro_batch_size": 2}
    done = run_ranks(recipe, tmp_path / "two", *override(**keys, **compiled, **ENGINES[engine]))
    assert_real(engine, done.out)
    assert_same_numbers(read_metrics(tmp_path / "two" / "metrics.jsonl"), reference)


@pytest.mark.parametrize("key", ["fsdp", "deepspeed"])
def test_what_an_engine_cannot_spread_is_refused_with_what_it_can(key, write_recipe):
    engine = {"fsdp": ENGINES["FSDP2"], "deepspeed": zero(2)}[key]
    for name, kind in OPTIMIZERS.items():
        recipe = write_recipe(optimizer=name, **engine)
        if key in kind.not_sharded:
            with pytest.raises(RecipeError, match=f"optimizer {name} is not supported under .* Write `optimizer: "):
                load(recipe)
        else:
            load(recipe)
