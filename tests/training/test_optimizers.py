"""Each optimizer is the one of its name, decays matrices only, and goes on bitwise from a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from support.processes import run_command
from support.results import largest_difference, unfinished, weights_of
from torch import nn

from finetuner.errors import CheckpointError, PlanError, RecipeError
from finetuner.parallel.optimizer_state import (
    CombinedOptimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from finetuner.recipe import load
from finetuner.recipe.optimizers import OPTIMIZERS, TrainedTensor, read_arguments
from finetuner.recipe.sections import AdapterSection, OptimizerSection, RatesSection
from finetuner.training.optimizer import BUILDERS, build_optimizer, own_rates

CPU = torch.device("cpu")


def small_parameters() -> dict[str, nn.Parameter]:
    """A table, two matrices of which one is large enough for 8 bits, and a norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (16, 8), "wide": (64, 80), "square": (8, 8), "norm": (8,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def make(parameters: dict[str, nn.Parameter], **keys: object) -> torch.optim.Optimizer:
    section = OptimizerSection.model_validate(keys)
    return build_optimizer(parameters, section, device=CPU, vocabulary=frozenset({"embed"}))


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], number: int, lr: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    set_learning_rate(optimizer, lr)
    optimizer.step()


def trajectory(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    for number in range(4):
        step(optimizer, parameters, number)
    return {name: p.detach().clone() for name, p in parameters.items()}


DECAY = 0.1


def reference(name: str, parameters: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The same by hand, from the libraries: decay on what has two dimensions."""
    import bitsandbytes.optim as bnb
    from transformers.optimization import Adafactor

    def groups(*names: str) -> list[dict]:
        return [{"params": [parameters[n]], "weight_decay": DECAY * (n != "norm")} for n in names]

    every, adam = groups(*parameters), {"betas": (0.8, 0.95)}
    rate = 0.01
    made = {
        "adamw_torch": lambda: [torch.optim.AdamW(every, rate, **adam)],
        "paged_adamw_32bit": lambda: [torch.optim.AdamW(every, rate, **adam)],
        "adamw_bnb_8bit": lambda: [bnb.AdamW8bit(every, rate, **adam)],
        "lion_8bit": lambda: [bnb.Lion8bit(every, rate, **adam)],
        "lion_32bit": lambda: [bnb.Lion32bit(every, rate, **adam)],
        "adafactor": lambda: [Adafactor(every, rate, scale_parameter=False, relative_step=False)],
        "sgd": lambda: [torch.optim.SGD(every, rate, momentum=0.9, nesterov=True)],
        "rmsprop": lambda: [torch.optim.RMSprop(every, rate, alpha=0.9)],
        "adagrad": lambda: [torch.optim.Adagrad(every, rate)],
        "muon": lambda: [
            torch.optim.Muon(groups("wide", "square"), rate, momentum=0.9),
            torch.optim.AdamW(groups("embed", "norm"), rate, **adam),
        ],
    }
    return made[name]()


ARGUMENTS: dict[str, object] = {
    "sgd": "momentum=0.9, nesterov=true",
    "rmsprop": {"alpha": 0.9},
    "muon": {"momentum": 0.9},
    "adagrad": {"lr_decay": 0},
    "adafactor": {"clip_threshold": 1.0},
}


def keys_of(name: str) -> dict[str, object]:
    keys: dict[str, object] = {"optimizer": name, "weight_decay": DECAY, "optim_args": ARGUMENTS.get(name, {})}
    if OPTIMIZERS[name].uses_betas:
        keys |= {"adam_beta1": 0.8, "adam_beta2": 0.95}
    if name == "adagrad":
        keys["adam_epsilon"] = 1e-10  # its own default
    return keys


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit", "adafactor", "sgd", "rmsprop",
     "adagrad", "muon"],
)  # fmt: skip
def test_an_optimizer_takes_the_steps_of_the_one_it_is_named_after(name):
    ours, theirs = small_parameters(), small_parameters()
    mine = trajectory(make(ours, **keys_of(name)), ours)
    optimizers = reference(name, theirs)
    for number in range(4):
        for optimizer in optimizers:
            step(optimizer, theirs, number)
    assert largest_difference(mine, {n: p.detach() for n, p in theirs.items()}) < 1e-6


# test_torchao_optimizers.py has those of torchao, which need not be installed
INSTALLED = sorted(name for name, row in OPTIMIZERS.items() if row.builder != "torchao")


@pytest.mark.parametrize("name", INSTALLED)
def test_the_state_of_every_optimizer_goes_through_names_and_back(name):
    ours, again = small_parameters(), small_parameters()
    first = make(ours, **keys_of(name))
    for number in range(2):
        step(first, ours, number)
    second = make(again, **keys_of(name))
    with torch.no_grad():
        for key in again:
            again[key].copy_(ours[key])
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(first, ours).items()}
    load_optimizer_tensors(second, again, saved)
    for number in range(2, 4):
        step(first, ours, number)
        step(second, again, number)
    assert largest_difference({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in again.items()}) == 0
    before, after = optimizer_tensors(first, ours), optimizer_tensors(second, again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state, without step counters and bitsandbytes' code books (qmap)."""
    return sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.ndim and not name.startswith("qmap")
    )


STATE_CASES = [
    *((name, ARGUMENTS.get(name, {})) for name in INSTALLED),
    ("adamw_torch", {"amsgrad": True}),
    ("adamw_bnb_8bit", {"min_8bit_size": 1_000_000}),
    ("adamw_bnb_8bit", {"min_8bit_size": 1}),
    ("sgd", {}),
    ("rmsprop", {"momentum": 0.9}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
    ("adafactor", {"beta1": 0.9}),
]


@pytest.mark.parametrize(("name", "arguments"), STATE_CASES)
def test_the_bytes_of_state_that_are_counted_are_those_of_the_optimizer_after_a_step(name, arguments):
    generator = torch.Generator().manual_seed(0)
    shapes = {"odd": (5001,), "experts": (3, 16, 32)} if name != "muon" else {"odd": (5001,)}
    parameters = small_parameters()
    parameters |= {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in shapes.items()}
    optimizer = make(parameters, **keys_of(name) | {"optim_args": arguments})
    step(optimizer, parameters, 0)
    given = read_arguments(arguments)
    tensors = [TrainedTensor(tuple(p.shape), key == "embed") for key, p in parameters.items()]
    counted = sum(OPTIMIZERS[name].state_bytes(tensor, given) for tensor in tensors)
    assert counted == state_bytes(optimizer)
    assert counted > 0 or (name, arguments) == ("sgd", {})


def test_every_builder_is_used_and_every_row_has_one():
    assert {row.builder for row in OPTIMIZERS.values()} == set(BUILDERS)


def test_muon_has_nothing_to_do_without_a_hidden_matrix():
    parameters = {name: p for name, p in small_parameters().items() if name in ("embed", "norm")}
    with pytest.raises(PlanError, match="none is trained"):
        make(parameters, optimizer="muon")
    alone = {"square": small_parameters()["square"]}
    assert not isinstance(make(alone, optimizer="muon"), CombinedOptimizer)


def test_the_rows_of_tokens_are_found_in_a_whole_and_in_an_adapted_model(tiny_model):
    from transformers import AutoModelForCausalLM

    from finetuner.models.adapter import add_lora
    from finetuner.models.embeddings import vocabulary_parameters
    from finetuner.recipe.sections import AdapterSection

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert vocabulary_parameters(model, model) == {"model.embed_tokens.weight", "lm_head.weight"}
    adapted = add_lora(model, AdapterSection(adapter="lora"), base_model="x", seed=0, new_token_ids=(3,))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    found = {n.rpartition("model.")[2] for n in trained & vocabulary_parameters(adapted, model)}
    assert found == {
        "embed_tokens.token_adapter.trainable_tokens_delta.default",
        "lm_head.token_adapter.trainable_tokens_delta.default",
    }


def trained(adapter: dict, rates: dict, base: Path, peak_lr: float = 0.01) -> dict[str, tuple[float, float]]:
    """name -> (learning rate, decay) of what is trained of a model with this adapter."""
    from transformers import AutoModelForCausalLM

    from finetuner.models.adapter import add_lora
    from finetuner.models.embeddings import vocabulary_parameters
    from finetuner.models.trainable import trainable_parameters

    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = add_lora(model, AdapterSection(adapter="lora", **adapter), base_model="x", seed=0)
    parameters, tables = trainable_parameters(adapted), vocabulary_parameters(adapted, model)
    own = own_rates(parameters, RatesSection(**rates), peak_lr, tables)
    optimizer = build_optimizer(parameters, OptimizerSection(weight_decay=DECAY), device=CPU, rates=own)
    set_learning_rate(optimizer, peak_lr)
    names = {id(p): name for name, p in parameters.items()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_lora_plus_has_pefts_rates(tiny_model):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    targets, ratio = ["q_proj", "lm_head"], 8.0
    ours = trained(
        {"lora_target_modules": targets, "lora_target_linear": False}, {"loraplus_lr_ratio": ratio}, tiny_model
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=targets))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=ratio)
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: rate for name, (rate, _) in ours.items()} == pytest.approx(theirs)
    assert set(theirs.values()) == {0.01, 0.08}


def test_embeddings_and_named_weights_have_rates_of_their_own_and_keep_their_decay(tiny_model):
    from finetuner.errors import ModelError

    whole = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    for rates in ({"embedding_lr": 1e-3}, {"embedding_lr_scale": 0.1}):
        rated = trained(whole, rates, tiny_model)
        tables = {name: of for name, of in rated.items() if "embed_tokens" in name or "lm_head" in name}
        assert len(tables) == 2 and list(tables.values()) == [(pytest.approx(1e-3), DECAY)] * 2
        assert {of for name, of in rated.items() if name not in tables} == {(0.01, DECAY)}
    groups = [{"name": "values", "modules": ["v_proj", "o_proj"], "lr": 0.5}]
    rated = trained({}, {"lr_groups": groups}, tiny_model)
    named = {name for name, (rate, _) in rated.items() if rate == 0.5}
    assert named == {name for name in rated if "v_proj" in name or "o_proj" in name} and len(named) == 8
    with pytest.raises(ModelError, match="no embedding is trained"):
        trained({}, {"embedding_lr": 1e-3}, tiny_model)
    with pytest.raises(ModelError, match="lr_groups 'mine': no weight that is trained has 'w_proj'"):
        trained({}, {"lr_groups": [{"name": "mine", "modules": ["w_proj"], "lr": 0.5}]}, tiny_model)


@pytest.mark.slow
def test_a_run_with_rates_of_its_own_logs_the_schedules_and_resumes_bitwise(write_recipe, train, tmp_path):
    recipe = write_recipe(
        adapter="lora", lora_modules_to_save=["lm_head"], loraplus_lr_ratio=4.0, embedding_lr=1e-4, max_steps=4,
        save_steps=2, micro_batch_size=4, lr_scheduler="constant", optimizer="muon",
    )  # fmt: skip
    rows = train(recipe, f"output_dir={tmp_path / 'a'}")
    assert [row["learning_rate"] for row in rows] == [1e-3] * 4
    again = train(recipe, f"output_dir={unfinished(tmp_path / 'a', tmp_path / 'b', 2)}", "resume_from_checkpoint=true")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    other = train(recipe, f"output_dir={tmp_path / 'c'}", "loraplus_lr_ratio=1.0")
    assert other[-1]["loss"] != rows[-1]["loss"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer": "sgd", "optim_args": {"momentun": 0.9}}, "sgd has no argument 'momentun'.*mean 'momentum'"),
        ({"optim_args": "amsgrad"}, "'amsgrad', which is not NAME=VALUE"),
        ({"optim_args": {"amsgrad": 1}}, "amsgrad is 1, but must be true or false"),
        ({"optimizer": "paged_adamw_32bit", "optim_args": {"x": 1}}, "It takes none"),
        ({"optimizer": "sgd", "adam_beta1": 0.8}, "adam_beta1 has no effect with `optimizer: sgd`"),
        ({"optimizer": "lion_8bit", "adam_epsilon": 0.1}, "adam_epsilon has no effect"),
        ({"optimizer": "muon", "fsdp": ["full_shard"]}, "muon is not supported under FSDP: it needs whole matrices"),
        ({"optimizer": "adafactor", "deepspeed": {"zero_optimization": {"stage": 1}}}, "under DeepSpeed"),
        ({"optimizer": "lion_32bit", "fsdp_config": {"version": 2}}, "kernels cannot work on FSDP's shards"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take_are_refused_before_anything_is_loaded(keys, message, write_recipe):
    with pytest.raises(RecipeError, match=message):
        load(write_recipe(**keys))


def test_arguments_are_a_block_or_one_text():
    assert read_arguments("momentum=0.9,nesterov=True, ns_steps=5, adjust_lr_fn=original") == {
        "momentum": 0.9, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "original",
    }  # fmt: skip
    assert read_arguments({"a": 1}) == {"a": 1} and read_arguments("") == {}


ZERO = {"deepspeed": {"zero_optimization": {"stage": 1}}, "optimizer": "adamw_bnb_8bit"}


@pytest.mark.slow
@pytest.mark.matrix
def test_moments_in_8_bits_under_zero_resume_bitwise_on_their_ranks_and_are_refused_elsewhere(
    write_recipe, train, tmp_path
):
    recipe = write_recipe(**ZERO, max_steps=4, save_steps=2, weight_decay=0.1, micro_batch_size=4)

    def run(out: str, *overrides: str, ranks: int = 2):
        return run_command("finetuner.train", recipe, f"output_dir={tmp_path / out}", *overrides, ranks=ranks)

    first = run("a")
    assert first.code == 0 and "ZeRO-1 over 2 ranks" in first.text, first.text
    exact = train(recipe, "deepspeed=", "optimizer=adamw_torch", "micro_batch_size=8", f"output_dir={tmp_path / 'one'}")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-6)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in exact], rel=1e-3)
    assert 0 < largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "one")) < 5e-3

    unfinished(tmp_path / "a", tmp_path / "b", 2)
    again = run("b", "resume_from_checkpoint=true")
    assert again.code == 0, again.text
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    last = f"checkpoints/step-{4:08}/optimizer.safetensors"
    assert (tmp_path / "a" / last).read_bytes() == (tmp_path / "b" / last).read_bytes()

    refusal = "zero rank 0 of 2, stage 1"
    unfinished(tmp_path / "a", tmp_path / "c", 2)
    alone = run("c", "resume_from_checkpoint=true", "micro_batch_size=8", ranks=0)
    assert alone.code == 2 and refusal in alone.text and "number of ranks that wrote it" in alone.text
    unfinished(tmp_path / "a", tmp_path / "d", 2)
    with pytest.raises(CheckpointError, match=refusal):
        train(recipe, "deepspeed=", "micro_batch_size=8", f"output_dir={tmp_path / 'd'}", "resume_from_checkpoint=true")
