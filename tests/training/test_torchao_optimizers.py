"""torchao's AdamW in 8 and 4 bits: its own steps, and a state that goes through files bitwise, under FSDP2 too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run_command
from support.results import largest_difference, unfinished, weights_of
from support.rows import RecipeWriter
from torch import nn

from finetuner.errors import CheckpointError, PlanError, RecipeError
from finetuner.parallel.optimizer_state import (
    OF_SHARDS,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from finetuner.recipe import load
from finetuner.recipe.optimizers import OPTIMIZERS, TrainedTensor
from finetuner.recipe.sections import OptimizerSection
from finetuner.training import optimizer as builders

NAMES = ["adamw_torch_8bit", "adamw_torch_4bit", "ao_adamw_fp8"]
DECAY = 0.1
# importing it, torchao looks for kernels of another Python and says so; 0.18 registers an enum as older torch wants it
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def torchao() -> Any:
    return pytest.importorskip("torchao.optim.adam")


def parameters() -> dict[str, nn.Parameter]:
    """A matrix of whole blocks, one that is too small for them, one of no whole blocks, and a norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (64, 80), "square": (8, 8), "odd": (65, 67), "norm": (8,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def make(given: dict[str, nn.Parameter], name: str, **arguments: int) -> torch.optim.Optimizer:
    section = OptimizerSection(
        optimizer=name, weight_decay=DECAY, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, optim_args=arguments
    )
    return builders.build_optimizer(given, section, device=torch.device("cpu"))


def step(optimizer: torch.optim.Optimizer, given: dict[str, nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in given.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_the_steps_of_torchaos_own(name: str, torchao: Any) -> None:
    ours, theirs = parameters(), parameters()
    mine = make(ours, name)
    groups = [{"params": [p], "weight_decay": DECAY * (p.ndim > 1)} for p in theirs.values()]
    its = getattr(torchao, OPTIMIZERS[name].class_name)(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-7, block_size=256)
    with torch.compiler.set_stance("force_eager"):
        for number in range(4):
            step(mine, ours, number)
            step(its, theirs, number)
    assert largest_difference({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in theirs.items()}) == 0
    # and these are no fp32 steps
    exact = parameters()
    adamw = torch.optim.AdamW([{"params": [p], "weight_decay": DECAY * (p.ndim > 1)} for p in exact.values()], 0.01,
                              betas=(0.8, 0.95), eps=1e-7)  # fmt: skip
    for number in range(4):
        step(adamw, exact, number)
    assert 0 < (ours["wide"] - exact["wide"]).abs().max() < 0.05
    assert torch.allclose(ours["square"], exact["square"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_its_state_goes_through_a_file_and_back_bitwise(name: str, torchao: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ours, again = parameters(), parameters()
    first, second = make(ours, name), make(again, name)
    for number in range(2):
        step(first, ours, number)
    with torch.no_grad():
        for key in again:
            again[key].copy_(ours[key])
    save_file(optimizer_tensors(first, ours), tmp_path / "o.safetensors")
    load_optimizer_tensors(second, again, load_file(tmp_path / "o.safetensors"))
    for number in range(2, 4):
        step(first, ours, number)
        step(second, again, number)
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    before, after = optimizer_tensors(first, ours), optimizer_tensors(second, again)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert before["wide::exp_avg.codes"].element_size() == 1


@pytest.mark.parametrize("arguments", [{}, {"block_size": 64}])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_its_state_are_counted(name: str, arguments: dict[str, int], torchao: Any) -> None:
    given = parameters()
    optimizer = make(given, name, **arguments)
    step(optimizer, given, 0)
    held = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, given).values() if tensor.ndim)
    assert held == sum(OPTIMIZERS[name].state_bytes(TrainedTensor(tuple(p.shape)), arguments) for p in given.values())


def test_a_state_of_another_shard_is_refused(torchao: Any) -> None:
    given = parameters()
    optimizer = make(given, "adamw_torch_8bit")
    step(optimizer, given, 0)
    stored = {f"{OF_SHARDS}0 of 2, {key}": tensor for key, tensor in optimizer_tensors(optimizer, given).items()}
    with pytest.raises(CheckpointError, match="as fsdp rank 0 of 2 held it"):
        load_optimizer_tensors(make(parameters(), "adamw_torch_8bit"), given, stored)


def test_without_torchao_it_is_said_before_anything_is_loaded(
    write_recipe: RecipeWriter, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match=r"needs torchao: pip install finetuner\[torchao\]"):
        train(write_recipe(optimizer="adamw_torch_4bit", base_model="org/never-fetched"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("ao_adamw_8bit", "adamw_torch_8bit"), ("ao_adamw_4bit", "adamw_torch_4bit"), ("ao_adamw_fp8", "ao_adamw_fp8")],
)
def test_axolotls_names_are_torchaos_classes(write_recipe: RecipeWriter, theirs: str, ours: str) -> None:
    assert load(write_recipe(optimizer=theirs)).recipe.optimizer.optimizer == ours


def test_what_an_engine_cannot_shard_names_what_it_can(write_recipe: RecipeWriter) -> None:
    with pytest.raises(RecipeError, match=r"under FSDP: .* Write `optimizer: adamw_torch_8bit`"):
        load(write_recipe(optimizer="paged_adamw_8bit", fsdp=["full_shard"]))
    with pytest.raises(RecipeError, match=r"under DeepSpeed: .* Write `optimizer: adamw_bnb_8bit`"):
        load(write_recipe(optimizer="adamw_torch_8bit", deepspeed={"zero_optimization": {"stage": 2}}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_torch_4bit", "adamw_torch_8bit"])
def test_a_run_resumes_bitwise(name: str, torchao: Any, write_recipe: RecipeWriter, train: Any, tmp_path: Path) -> None:
    recipe = write_recipe(optimizer=name, max_steps=4, save_steps=2, micro_batch_size=4, weight_decay=0.1)
    rows = train(recipe, f"output_dir={tmp_path / 'a'}")
    again = train(recipe, f"output_dir={unfinished(tmp_path / 'a', tmp_path / 'b', 2)}", "resume_from_checkpoint=true")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_under_fsdp_a_run_resumes_bitwise_on_its_ranks_and_is_refused_elsewhere(
    kind: str, torchao: Any, write_recipe: RecipeWriter, train: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(
        optimizer="adamw_torch_8bit", max_steps=4, save_steps=2, micro_batch_size=2, weight_decay=0.1,
        fsdp=["full_shard", "auto_wrap"], fsdp_config={"state_dict_type": kind},
    )  # fmt: skip

    def run(out: str, *overrides: str, ranks: int = 2) -> Any:
        return run_command("finetuner.train", recipe, f"output_dir={tmp_path / out}", *overrides, ranks=ranks)

    first = run("a")
    assert first.code == 0 and "FSDP2 over 2 ranks" in first.text, first.text
    alone = train(recipe, "fsdp=", "fsdp_config=", "micro_batch_size=4", f"output_dir={tmp_path / 'one'}")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-4)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "a")
    changed = sum(int(((one[name] - two[name]).abs() > 1e-4).sum()) for name in one)
    assert changed < 0.01 * sum(tensor.numel() for tensor in one.values())  # blocks begin elsewhere in a shard

    unfinished(tmp_path / "a", tmp_path / "b", 2)
    again = run("b", "resume_from_checkpoint=true")
    assert again.code == 0, again.text
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0

    unfinished(tmp_path / "a", tmp_path / "c", 2)
    refused = run("c", "resume_from_checkpoint=true", "fsdp=", "fsdp_config=", "micro_batch_size=4", ranks=0)
    assert refused.code == 2 and "as fsdp rank" in refused.text, refused.text
