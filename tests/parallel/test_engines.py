"""Every engine is real, gives the numbers of one rank, and leaves checkpoints that every other can go on from."""

import shutil
from pathlib import Path

import pytest
from support.engines import ENGINES, assert_real, assert_same_numbers, holds, override, run_ranks
from support.processes import run_command
from support.results import largest_difference, weights_of
from support.rows import alpaca_rows, write_rows
from support.tiny import make_model

from finetuner.errors import PlanError, RecipeError
from finetuner.training.metrics import read_metrics

ADAPTERS: dict[str, dict] = {
    "full": {},
    # a rank that two ranks cannot share evenly, and a token that gets a row of its own
    "lora": {"adapter": "lora", "lora_r": 3, "tokens": ["<|new|>"], "gradient_checkpointing": True},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "lora_r": 3},
}


@pytest.fixture
def unequal_rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "unequal.jsonl", alpaca_rows(80))


@pytest.fixture
def recipe(unequal_rows, write_recipe):
    return write_recipe(
        datasets=[{"path": str(unequal_rows), "type": "alpaca"}],
        max_steps=5,
        learning_rate=2e-4,
        warmup_steps=2,
        weight_decay=0.1,
        val_set_size=3,
        save_steps=3,
        seed=7,
    )


def compare_with_one_rank(engine: str, adapter: str, accum: int, recipe: Path, train, tmp_path: Path, capsys) -> None:
    """The same 12 rows a step on one rank in one micro-batch, and on two ranks in `accum` micro-batches each."""
    keys = ADAPTERS[adapter]
    reference = train(recipe, *override(**keys, micro_batch_size=12, output_dir=str(tmp_path / "one")))
    whole = holds(capsys.readouterr().out).parameters[0]
    split = {"micro_batch_size": 6 // accum, "gradient_accumulation_steps": accum}
    done = run_ranks(recipe, tmp_path / "two", *override(**keys, **split, **ENGINES[engine]))
    assert_real(engine, done.out, whole)
    assert_same_numbers(read_metrics(tmp_path / "two" / "metrics.jsonl"), reference)
    assert largest_difference(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 1e-6
    last = f"checkpoints/step-{5:08}"
    one, two = (weights_of(tmp_path / name / last) for name in ("one", "two"))
    assert one.keys() == two.keys(), "the same files from every engine; of an adapter's run, nothing of the base"
    assert largest_difference(one, two) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "adapter", "accum"),
    [("FSDP2 offloaded", "lora", 1), ("ZeRO-1", "lora", 3), ("ZeRO-3", "full", 1)],
)
def test_an_engine_gives_the_numbers_of_one_rank(engine, adapter, accum, recipe, train, tmp_path, capsys):
    compare_with_one_rank(engine, adapter, accum, recipe, train, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_numbers_of_one_rank(engine, adapter, accum, recipe, train, tmp_path, capsys):
    compare_with_one_rank(engine, adapter, accum, recipe, train, tmp_path, capsys)


def resumed(recipe: Path, source: Path, out: Path, step: int = 3) -> Path:
    """A folder with the run of `source` as it was at `step`."""
    name = f"checkpoints/step-{step:08}"
    shutil.copytree(source / name, out / name)
    shutil.copy(source / "metrics.jsonl", out)
    return out


SPLIT = ("micro_batch_size=4", "resume_from_checkpoint=true")
SHARDED = {"fsdp": ["full_shard"], "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


@pytest.mark.slow
def test_a_checkpoint_in_parts_resumes_bitwise_on_its_ranks_and_exactly_on_one(recipe, train, tmp_path):
    """The same tensors in one rank's memory as two wrote; what follows differs by the order of sums alone."""
    keys = override(**SHARDED)
    split = ("micro_batch_size=2", "gradient_accumulation_steps=2")
    assert_real("FSDP2", run_ranks(recipe, tmp_path / "a", *split, *keys).out)
    folder = tmp_path / "a" / "checkpoints" / "step-00000003"
    assert {p.name for p in folder.glob("*.safetensors")} == {"part-00000.safetensors", "part-00001.safetensors"}
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    assert max(sizes) < 1.1 * min(sizes)

    run_ranks(recipe, resumed(recipe, tmp_path / "a", tmp_path / "b"), *split, "resume_from_checkpoint=true", *keys)
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    for name in ("part-00000", "part-00001"):
        last = f"checkpoints/step-00000005/{name}.safetensors"
        assert (tmp_path / "a" / last).read_bytes() == (tmp_path / "b" / last).read_bytes()

    one = resumed(recipe, tmp_path / "a", tmp_path / "c")
    rows = train(recipe, f"output_dir={one}", "resume_from_checkpoint=true", "micro_batch_size=8")
    assert_same_numbers(rows, read_metrics(tmp_path / "a" / "metrics.jsonl"))
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(one)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_run_that_keeps_gathered_weights_resumes_bitwise(kind, recipe, tmp_path):
    """A forward without a backward leaves them gathered: the shards' names must still mean the shards."""
    keys = override(fsdp=["shard_grad_op"], fsdp_config={"state_dict_type": kind}, eval_steps=3)
    run_ranks(recipe, tmp_path / "a", "micro_batch_size=4", *keys)
    run_ranks(recipe, resumed(recipe, tmp_path / "a", tmp_path / "b"), *SPLIT, *keys)
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    a, b = (read_metrics(tmp_path / run / "metrics.jsonl") for run in "ab")
    assert [row["loss"] for row in a if "loss" in row] == [row["loss"] for row in b if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["the folder", "the other rank's file"])
def test_a_disk_that_refuses_a_checkpoint_in_parts_ends_all_ranks_with_one_message(refused, recipe, tmp_path):
    """Ranks wait for one another here: an error that one kept to itself would leave the others until ddp_timeout."""
    out = tmp_path / "out"
    place = out / "checkpoints"
    if refused == "the folder":
        out.mkdir()
        place.touch()
    done = run_command(
        "support.refusing_disk" if refused != "the folder" else "finetuner.train",
        recipe, f"output_dir={out}", "micro_batch_size=4", *override(**SHARDED), ranks=2, timeout=60,
    )  # fmt: skip
    assert done.code == 2 and done.text.count("cannot write the checkpoint") == 1, done.text
    assert "Traceback" not in done.text
    assert not place.is_dir() or not list(place.iterdir()), "nothing is left of it"


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("precision", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["FSDP2", "FSDP2 offloaded", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_a_resumed_run_is_bitwise_the_unbroken_run_in_every_engine(engine, precision, adapter, recipe, tmp_path):
    keys = override(**ADAPTERS[adapter], **ENGINES[engine], bf16=precision)
    run_ranks(recipe, tmp_path / "a", "micro_batch_size=4", *keys)
    run_ranks(recipe, resumed(recipe, tmp_path / "a", tmp_path / "b"), *SPLIT, *keys)
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    last = "checkpoints/step-00000005/optimizer.safetensors"
    assert (tmp_path / "a" / last).read_bytes() == (tmp_path / "b" / last).read_bytes()


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("after", ENGINES)
@pytest.mark.parametrize("before", ["one rank", "FSDP2", "ZeRO-2", "ZeRO-3"])
def test_a_run_goes_on_in_another_engine_and_on_another_number_of_ranks(before, after, recipe, train, tmp_path):
    if before == "one rank":
        train(recipe, "micro_batch_size=8", f"output_dir={tmp_path / 'a'}")
    else:
        run_ranks(recipe, tmp_path / "a", "micro_batch_size=4", *override(**ENGINES[before]))
    run_ranks(recipe, resumed(recipe, tmp_path / "a", tmp_path / "b"), *SPLIT, *override(**ENGINES[after]))
    alone = resumed(recipe, tmp_path / "a", tmp_path / "c")
    train(recipe, f"output_dir={alone}", "micro_batch_size=8", "resume_from_checkpoint=true")
    unbroken = read_metrics(tmp_path / "a" / "metrics.jsonl")
    for name in ("b", "c"):
        assert_same_numbers(read_metrics(tmp_path / name / "metrics.jsonl"), unbroken)
        assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / name)) < 1e-6


@pytest.mark.slow
@pytest.mark.matrix
def test_hybrid_sharding_on_two_copies_of_two_ranks_gives_the_numbers_of_one(recipe, train, tmp_path):
    reference = train(recipe, "micro_batch_size=12", f"output_dir={tmp_path / 'one'}")
    hybrid = override(fsdp=["hybrid_shard"], dp_replicate_size=2, micro_batch_size=3)
    done = run_ranks(recipe, tmp_path / "four", *hybrid, ranks=4)
    found = holds(done.out)
    assert found.engine == "FSDP2 over 2 copies x 2 ranks"
    assert sum(found.parameters) == found.total
    assert_same_numbers(read_metrics(tmp_path / "four" / "metrics.jsonl"), reference)


KEYS: dict[str, dict] = {
    "whole modules": {"adapter": "lora", "lora_r": 3, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": {"adapter": "lora", "lora_r": 3, "peft_use_dora": True},
    "unfrozen": {"unfrozen_parameters": ["model.layers.1", "lm_head"]},
    "best": {"load_best_model_at_end": True, "save_strategy": "best", "eval_steps": 1, "save_steps": None},
    "packs": {"adapter": "qlora", "sample_packing": True, "max_steps": 2, "save_steps": 1},
    "8 bits": {"adapter": "lora", "lora_r": 3, "load_in_8bit": True},
}


def compare_keys(engine: str, keys: dict, recipe: Path, train, tmp_path: Path) -> None:
    reference = train(recipe, *override(**keys, micro_batch_size=4, output_dir=str(tmp_path / "one")))
    run_ranks(recipe, tmp_path / "two", *override(**keys, **ENGINES[engine], micro_batch_size=2))
    assert_same_numbers(read_metrics(tmp_path / "two" / "metrics.jsonl"), reference)
    assert largest_difference(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 1e-6


@pytest.mark.slow
def test_what_an_adapter_copies_and_measures_of_its_base_is_the_same_when_the_base_is_sharded(recipe, train, tmp_path):
    compare_keys("FSDP2", KEYS["whole modules"] | {"peft_use_dora": True}, recipe, train, tmp_path)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-2", "ZeRO-3", "DDP"])
def test_keys_of_adapters_and_guards_mean_the_same_in_every_engine(engine, keys, recipe, train, tmp_path):
    if keys == "8 bits" and engine in ("FSDP2", "ZeRO-3"):
        pytest.skip("refused: see test_an_8_bit_base_is_not_sharded")
    compare_keys(engine, KEYS[keys], recipe, train, tmp_path)


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_an_8_bit_base_is_not_sharded(engine, recipe, train):
    with pytest.raises(PlanError, match=r"load_in_8bit is for one GPU, DDP"):
        train(recipe, *override(**KEYS["8 bits"], **ENGINES[engine]))


def test_dora_on_a_4_bit_base_is_refused(recipe, train):
    with pytest.raises(RecipeError, match="DoRA measures the columns of full weights"):
        train(recipe, "adapter=qlora", "peft_use_dora=true")


@pytest.mark.slow
def test_a_sharded_recipe_runs_on_one_rank(recipe, train, capsys, tmp_path):
    plain = train(recipe, "micro_batch_size=4", f"output_dir={tmp_path / 'plain'}")
    capsys.readouterr()
    keys = override(**SHARDED, micro_batch_size=4, output_dir=str(tmp_path / "fsdp"))
    assert_same_numbers(train(recipe, *keys), plain)
    assert holds(capsys.readouterr().out).engine == "FSDP2 over 1 rank"
    again = train(recipe, f"output_dir={resumed(recipe, tmp_path / 'fsdp', tmp_path / 'b')}", *SPLIT)
    assert_same_numbers(again, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
        {"fsdp": ["shard_grad_op"], "fsdp_config": {"forward_prefetch": True, "activation_checkpointing": True}},
        {"fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaMLP,LlamaAttention"}},
    ],
    ids=["the whole model at once", "kept until the backward", "layers by name"],
)
def test_what_is_gathered_when_changes_no_number(keys, recipe, train, tmp_path):
    plain = train(recipe, "micro_batch_size=4", f"output_dir={tmp_path / 'plain'}")
    wrapped = train(recipe, *override(**keys, micro_batch_size=4, output_dir=str(tmp_path / "fsdp")))
    assert_same_numbers(wrapped, plain)


def fsdp_plan(**options):
    from finetuner.plan.parallel import FsdpOptions, ParallelPlan

    return ParallelPlan("fsdp", fsdp=FsdpOptions(**options))


def sharded_here(plan, tied_or_not: Path):
    """A tiny model, sharded in this process on a group of one."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetuner.objectives.loss_module import LossModule
    from finetuner.objectives.next_token import NextToken
    from finetuner.parallel.fsdp import shard_module

    loss = LossModule(AutoModelForCausalLM.from_pretrained(tied_or_not), NextToken(), composed=True)
    shard_module(loss, plan, torch.device("cpu"), full=True)
    return loss


@pytest.fixture
def group_of_one():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({}, ["LlamaDecoderLayer"] * 2),
        ({"layer_classes": ("LlamaMLP",)}, ["LlamaMLP"] * 2),
        ({"wraps_layers": False}, []),
    ],
)
def test_the_layers_of_the_plan_are_gathered_one_by_one(changes, classes, tiny_model, group_of_one):
    from torch.distributed.fsdp import FSDPModule

    loss = sharded_here(fsdp_plan(pin_memory=False, **changes), tiny_model)
    wrapped = [type(m).__name__.removeprefix("FSDP") for m in loss.modules() if isinstance(m, FSDPModule)]
    assert sorted(wrapped) == sorted([*classes, "LossModule"])


def test_a_class_that_the_model_has_not_is_named_with_those_it_has(tiny_model, group_of_one):
    from finetuner.errors import ModelError

    with pytest.raises(ModelError, match=r"no module of the class 'MistralLayer'(.|\n)*LlamaDecoderLayer"):
        sharded_here(fsdp_plan(layer_classes=("MistralLayer",)), tiny_model)


def test_the_norm_of_a_sharded_gradient_is_torchs_and_clips_the_same(tiny_model, group_of_one):
    import torch
    from accelerate import Accelerator
    from torch.nn.utils import clip_grad_norm_
    from transformers import AutoModelForCausalLM

    from finetuner.parallel.fsdp import FsdpEngine

    loss = sharded_here(plan := fsdp_plan(pin_memory=False), tiny_model)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    engine = FsdpEngine(Accelerator(cpu=True), loss, optimizer, plan)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(24).reshape(2, 12)
    positions = torch.arange(20)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": positions,
        "targets": positions,
        "position_ids": None,
    }
    (engine.module(batch).sum() * 3.0).backward()
    logits = plain(ids).logits.flatten(0, 1)[positions]
    (torch.nn.functional.cross_entropy(logits, positions, reduction="sum") * 3.0).backward()
    mine = {n: p.grad.to_local() for n, p in loss.model.named_parameters()}  # clipped in place by the update
    norm, updated = engine.update(0.5, loss_is_finite=True)
    assert updated and norm == pytest.approx(float(clip_grad_norm_(plain.parameters(), 0.5)), rel=1e-5)
    assert largest_difference(mine, {n: p.grad for n, p in plain.named_parameters()}) < 1e-6


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_skipped_and_not_learned_in_zero_3(recipe, tmp_path):
    """DeepSpeed itself would go on with weights that are NaN."""
    keys = override(**ENGINES["ZeRO-3"], learning_rate=1e30, warmup_steps=1, lr_scheduler="constant", max_steps=20)
    done = run_command("finetuner.train", recipe, f"output_dir={tmp_path / 'out'}", *keys, ranks=2)
    assert done.code != 0 and "loss or gradient was not finite" in done.text
    for folder in (tmp_path / "out" / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in weights_of(folder).values())


@pytest.mark.slow
def test_only_the_main_rank_reads_the_model_and_tied_weights_stay_tied(recipe, tokenizer_folder, train, tmp_path):
    """With cpu_ram_efficient_loading, under accelerate's own launcher and a configuration of it."""
    import os
    import subprocess
    import sys

    from support.places import ROOT

    base = make_model(tmp_path / "base", tokenizer_folder, tied=True)
    reference = train(recipe, f"base_model={base}", "micro_batch_size=8", f"output_dir={tmp_path / 'one'}")
    words = ["--config_file", "fsdp_configs/fsdp2_qlora_low_ram.yml", "-m", "finetuner.train", str(recipe)]
    keys = override(
        base_model=str(base), micro_batch_size=4, output_dir=str(tmp_path / "two"), **ENGINES["FSDP2 offloaded"]
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))} | {"CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words, *keys]
    done = subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_real("FSDP2 offloaded", done.stdout)
    assert_same_numbers(read_metrics(tmp_path / "two" / "metrics.jsonl"), reference)
    assert largest_difference(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 1e-6


@pytest.mark.slow
def test_the_gradient_norm_of_a_real_vocabulary_is_one_number_in_every_engine(
    recipe, tokenizer_folder, train, tmp_path
):
    """49,152 rows of width 128: where fp32 norms of one gradient differ in the fourth digit, and with them clipping."""
    base = make_model(tmp_path / "base", tokenizer_folder, vocab_size=49_152, hidden_size=128)
    keys = {"base_model": str(base), "max_steps": 2, "max_grad_norm": 0.5, "val_set_size": 0}
    alone = train(recipe, *override(**keys, micro_batch_size=4, output_dir=str(tmp_path / "one")))
    assert alone[0]["grad_norm"] > 0.5, "it is clipped"
    for name in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"):
        out = tmp_path / name
        run_ranks(recipe, out, *override(**ENGINES[name], **keys, micro_batch_size=2))
        rows = read_metrics(out / "metrics.jsonl")
        assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in alone], rel=1e-6), name
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-6), name
