"""What `fsdp`, `fsdp_config` and `deepspeed` mean, before any rank is started."""

import json
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from support.places import ROOT

from finetuner.errors import PlanError, RecipeError
from finetuner.plan.parallel import EngineName, FsdpOptions, ParallelPlan, ZeroOptions
from finetuner.plan.run import Plan, plan_parallel
from finetuner.plan.zero import filled_in, zero_config_for
from finetuner.recipe import load, load_recipe
from finetuner.recipe.sections import BatchSection, FsdpConfig, ShardingSection
from finetuner.recipe.sections.sharding import ENGINE_KEYS
from finetuner.world import Launch, World, read_launch

TWO = World(size=2, local_size=2)
FSDP = {"fsdp": ["full_shard", "auto_wrap"]}


def engine_of(section, world=TWO, *, precision="fp32", micro_batch=4, grad_accum=3, max_grad_norm=1.0):
    batch = BatchSection(micro_batch_size=micro_batch, gradient_accumulation_steps=grad_accum)
    return plan_parallel(section, batch, world, precision=precision, max_grad_norm=max_grad_norm)


def fsdp(shard: int, replicate: int = 1, **options) -> ParallelPlan:
    return ParallelPlan("fsdp", shard=shard, replicate=replicate, fsdp=FsdpOptions(**options))


def section(**keys):
    if isinstance(keys.get("fsdp_config"), dict):
        keys["fsdp_config"] = FsdpConfig(**keys["fsdp_config"])
    return ShardingSection(**keys)


def mistakes(recipe, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def test_both_spellings_of_fsdp_config_are_one_recipe(write_recipe):
    long = write_recipe(
        "long.yml",
        fsdp="full_shard auto_wrap",
        fsdp_config={
            "fsdp_offload_params": True,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_state_dict_type": "full_state_dict",
            "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        },
    )
    short = write_recipe(
        "short.yml",
        **FSDP,
        fsdp_config={
            "offload_params": True,
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "auto_wrap_policy": "transformer_based_wrap",
        },
    )
    assert load_recipe(long) == load_recipe(short)
    assert not load_recipe(long, ["fsdp_config.offload_params=false"]).sharding.fsdp_config.offload_params
    assert "'offload_params' is given twice" in mistakes(
        write_recipe(**FSDP, fsdp_config={"fsdp_offload_params": True, "offload_params": False})
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsdp": ["full_shrad"]}, "must be one of"),
        ({"fsdp": ["auto_wrap"]}, "names no strategy"),
        ({"fsdp": ["full_shard", "no_shard"]}, "names 2 strategies: full_shard, no_shard"),
        ({"fsdp": ["no_shard", "offload"]}, "cannot be offloaded"),
        (FSDP | {"fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP"}}, "fsdp says full_shard"),
        (FSDP | {"fsdp_config": {"backward_prefetch": "SIDEWAYS"}}, "must be BACKWARD_PRE|must be one of"),
        (FSDP | {"fsdp_config": {"fsdp_offload_parms": True}}, "Did you mean 'offload_params'"),
        (FSDP | {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}}, "gathers the whole model at once"),
        (FSDP | {"fsdp_config": {"version": 2}, "fsdp_version": 1}, "fsdp_version is 1, fsdp_config.version is 2"),
        ({"fsdp_version": 2}, "no effect without `fsdp`"),
        ({"dp_shard_size": 2}, r"is for FSDP: add `fsdp: \[full_shard"),
        (FSDP | {"deepspeed": {"zero_optimization": {"stage": 1}}}, "two ways to shard the same model"),
        ({"deepspeed": {"ZeRO_optimization": {"stage": 1}}}, "Write 'zero_optimization'"),
        ({"deepspeed": {"zero_optimisation": {"stage": 1}}}, "Did you mean 'zero_optimization'"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "must be 1, 2 or 3"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "reduce_buckt_size": 1}}},
            "Did you mean 'reduce_bucket_size",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}}, "only stage 3"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}, "optimizer": {}}}, "the recipe's `optimizer` is used"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "nothing would be sharded"),
        ({"deepspeed": "deepspeed_configs/zero7.json"}, "there is no DeepSpeed file"),
    ],
)
def test_mistakes_about_sharding_are_named(keys, message, write_recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(**keys))


def test_a_deepspeed_file_is_read_where_it_is_named(write_recipe, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"ZeRO_optimization": {"stage": 1}}')
    assert f"{path}: DeepSpeed has no block 'ZeRO_optimization'" in mistakes(write_recipe(deepspeed=str(path)))
    path.write_text('{"bf16": {}, "bf16": {}}')
    assert "the key 'bf16' is given twice" in mistakes(write_recipe(deepspeed=str(path)))
    path.write_text("{")
    assert "is not JSON" in mistakes(write_recipe(deepspeed=str(path)))
    near = tmp_path / "zero1.json"
    near.write_text("{}")
    assert "Did you mean 'zero1.json'" in mistakes(write_recipe(deepspeed=str(tmp_path / "zero11.json")))


def test_the_words_of_fsdp1_become_fsdp2():
    def plan(*words, **config):
        return engine_of(section(fsdp=words, fsdp_config=config or None), World(size=8, local_size=4))[0]

    assert plan("full_shard", "auto_wrap") == fsdp(8, pin_memory=False)
    assert plan("shard_grad_op").fsdp.reshard_after_forward is False
    assert plan("shard_grad_op", reshard_after_forward=True).fsdp.reshard_after_forward is True
    hybrid = plan("hybrid_shard", "auto_wrap")
    assert (hybrid.replicate, hybrid.shard, hybrid.fsdp.reshard_after_forward) == (2, 4, True)
    assert plan("hybrid_shard_zero2").fsdp.reshard_after_forward is False
    assert plan("full_shard", "offload").offloads_weights and plan("full_shard", offload_params=True).offloads_weights
    assert plan("full_shard", state_dict_type="SHARDED_STATE_DICT").sharded_checkpoints
    assert plan("full_shard", cpu_ram_efficient_loading=True).main_rank_reads
    assert plan("full_shard", forward_prefetch=True).fsdp.forward_prefetch
    assert not plan("full_shard", auto_wrap_policy="NO_WRAP").fsdp.wraps_layers
    assert plan("no_shard") == ParallelPlan(replicate=8)


def test_what_weights_travel_in_follows_the_precision():
    sharded = section(fsdp=("full_shard",))
    assert engine_of(sharded, precision="bf16")[0].fsdp.gathers_bf16
    assert not engine_of(sharded)[0].fsdp.gathers_bf16
    asked = section(fsdp=("full_shard",), fsdp_config={"mixed_precision_policy": "fp32"})
    assert not engine_of(asked, precision="bf16")[0].fsdp.gathers_bf16
    with pytest.raises(PlanError, match="mixed_precision_policy is bf16, but the run computes in fp32"):
        engine_of(section(fsdp=("full_shard",), fsdp_config={"mixed_precision_policy": "bf16"}))


def test_what_is_mapped_is_said_once():
    notes = engine_of(section(fsdp=("no_shard",), fsdp_version=1))[1]
    assert len(notes) == 2 and "FSDP2 does the same" in notes[0] and "is DDP" in notes[1]
    assert engine_of(section(fsdp=("full_shard",)))[1] == ()


def test_sizes_of_hybrid_sharding_give_the_number_of_ranks():
    world = World(size=8, local_size=8)

    def sizes(**keys):
        plan, notes = engine_of(section(fsdp=("hybrid_shard",), **keys), world)
        return plan.replicate, plan.shard, len(notes)

    assert sizes() == (1, 8, 1)  # one node: a note says that there are no copies
    assert sizes(dp_replicate_size=2) == (2, 4, 0)
    assert sizes(dp_shard_size=2) == (4, 2, 0)
    with pytest.raises(PlanError, match="3 copies x 2 ranks are 6 ranks, but 8 were started"):
        sizes(dp_replicate_size=3)
    full, _ = engine_of(section(fsdp=("full_shard",), dp_shard_size=4, dp_replicate_size=2), world)
    assert (full.replicate, full.shard) == (2, 4)
    with pytest.raises(PlanError, match="1 copies x 4 ranks are 4 ranks, but 8 were started"):
        engine_of(section(fsdp=("full_shard",), dp_shard_size=4), world)


CONFIGS = sorted((ROOT / "deepspeed_configs").glob("*.json"))


def test_zero1_is_the_known_file():
    assert json.loads((ROOT / "deepspeed_configs" / "zero1.json").read_text()) == {
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "bf16": {"enabled": "auto"},
        "fp16": {
            "enabled": "auto", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 32,
            "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_deepspeed_config_is_filled_in_from_the_plan(path):
    plan, _ = engine_of(section(deepspeed=str(path)), precision="bf16")
    assert plan.zero is not None and plan.zero.stage == int(path.stem[4])
    assert plan.offloads_optimizer == path.stem.endswith("offload")
    config = zero_config_for(plan.zero, hidden_size=64)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 24 == 2 * 4 * 3
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 3)
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] is True and config["fp16"]["enabled"] is False
    said = filled_in(plan.zero, hidden_size=64)
    assert "train_batch_size 24" in said and "gradient_clipping 1.0" in said and "auto" not in said
    assert ("bf16.enabled true" in said) == ("bf16" not in path.stem)
    if plan.zero.stage == 3:
        assert config["zero_optimization"]["reduce_bucket_size"] == 64 * 64
        assert "zero_optimization.reduce_bucket_size 4096" in said
    if "bf16" in path.stem:
        with pytest.raises(PlanError, match=r"bf16\.enabled is true, but the run computes in fp32"):
            engine_of(section(deepspeed=str(path)))
    else:
        assert engine_of(section(deepspeed=str(path)))[0].zero.config["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, but the recipe's ranks x micro-batch x accumulation is 24"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but the recipe's max_grad_norm is 1.0"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, but the run computes in fp32"),
        ({"steps_per_print": "auto"}, 'steps_per_print is "auto", which nothing here can fill in'),
    ],
)
def test_a_deepspeed_config_that_contradicts_the_recipe_is_refused(block, message):
    with pytest.raises(PlanError, match=message):
        engine_of(section(deepspeed={"zero_optimization": {"stage": 2}} | block))


def test_a_sharded_run_in_fp16_is_refused():
    for keys in ({"fsdp": ("full_shard",)}, {"deepspeed": {"zero_optimization": {"stage": 1}}}):
        with pytest.raises(PlanError, match="fp16 is supported on one GPU and with DDP"):
            engine_of(section(**keys), World(size=2, device="cuda"), precision="fp16")


def test_a_missing_deepspeed_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("finetuner.plan.zero.importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'finetuner\[deepspeed\]'"):
        engine_of(section(deepspeed={"zero_optimization": {"stage": 1}}))


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "no"}
RECIPES = {
    "fsdp2_full": {"fsdp": ("full_shard", "auto_wrap")},
    "fsdp2_hybrid": {"fsdp": ("hybrid_shard", "auto_wrap"), "dp_replicate_size": 2, "dp_shard_size": 8},
    "fsdp2_offload": {"fsdp": ("full_shard", "auto_wrap"), "fsdp_config": {"offload_params": True}},
    "fsdp2_qlora_low_ram": {
        "fsdp": ("full_shard", "auto_wrap"),
        "fsdp_config": {"offload_params": True, "cpu_ram_efficient_loading": True},
    },
}


def variables_of(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` sets for its processes, by Accelerate's own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(path), "--machine_rank", "0", "--main_process_ip", "localhost", "-m", "x"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", sorted((ROOT / "fsdp_configs").glob("*.yml")), ids=lambda p: p.stem)
def test_every_launch_config_agrees_with_its_recipe_and_no_other(path):
    launch = read_launch(variables_of(path))
    assert launch.engine == "fsdp" and launch.settings
    world = World(size=16, local_size=8, launch=launch)
    for name, keys in RECIPES.items():
        offloads = ("offload" in name or "low_ram" in name) == ("offload" in path.stem or "low_ram" in path.stem)
        hybrid = "hybrid" in path.stem and "hybrid" not in name
        low_ram = "low_ram" in name and "low_ram" not in path.stem
        if offloads and not hybrid and not low_ram:
            assert engine_of(section(**keys), world)[0].engine == "fsdp"
        else:
            with pytest.raises(PlanError, match="contradicts the recipe"):
                engine_of(section(**keys), world)
    with pytest.raises(PlanError, match="asks for fsdp, the recipe has neither fsdp nor deepspeed"):
        engine_of(section(), world)


def test_a_launch_config_for_deepspeed_is_compared_as_well(tmp_path):
    one, two = (str(ROOT / "deepspeed_configs" / f"zero{n}.json") for n in (1, 2))

    def run(recipe, **env):
        launch = read_launch({"ACCELERATE_USE_DEEPSPEED": "true"} | env)
        return engine_of(recipe, World(size=2, launch=launch))[0]

    assert run(section(deepspeed=one), ACCELERATE_DEEPSPEED_CONFIG_FILE=one).zero.stage == 1
    with pytest.raises(PlanError, match=r"zero1.json there, .*zero2.json by the recipe"):
        run(section(deepspeed=two), ACCELERATE_DEEPSPEED_CONFIG_FILE=one)
    with pytest.raises(PlanError, match="zero_stage: 3 there, 2 by the recipe"):
        run(section(deepspeed=two), ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    with pytest.raises(PlanError, match="asks for deepspeed, the recipe has `fsdp`"):
        run(section(fsdp=("full_shard",)))
    with pytest.raises(PlanError, match=r"says mixed_precision: bf16, but .* fp32"):
        engine_of(section(), World(launch=Launch(mixed_precision="bf16")))


def test_the_plan_carries_the_engine(write_recipe):
    loaded = load(write_recipe(**FSDP, micro_batch_size=2))
    assert Plan.from_recipe(loaded.recipe, TWO).parallel == fsdp(2, pin_memory=False)
    assert Plan.from_recipe(load_recipe(write_recipe()), TWO).parallel == ParallelPlan(replicate=2)


@pytest.mark.parametrize(
    ("plan", "name", "sharded"),
    [
        (ParallelPlan(), "one rank", (False, False, False)),
        (ParallelPlan(replicate=4), "DDP over 4 ranks", (False, False, False)),
        (fsdp(4), "FSDP2 over 4 ranks", (True, True, True)),
        (fsdp(4, 2, offload=True), "FSDP2 over 2 copies x 4 ranks, offloaded to the CPU", (True, True, True)),
        *(
            (
                ParallelPlan("zero", shard=2, zero=ZeroOptions(stage, {"zero_optimization": {}})),
                f"ZeRO-{stage} over 2 ranks",
                (stage == 3, stage >= 2, True),
            )
            for stage in (1, 2, 3)
        ),
    ],
)
def test_a_layout_says_what_each_rank_keeps(plan, name, sharded):
    assert plan.name == name
    assert (plan.shards_weights, plan.shards_gradients, plan.shards_optimizer) == sharded
    assert plan.world_size == plan.data_parallel == plan.replicate * plan.shard


def test_every_engine_has_its_keys_its_plan_and_its_file():
    engines = get_args(EngineName)
    assert {"replicated", *ENGINE_KEYS} == set(engines)
    for engine in ENGINE_KEYS:
        assert callable(import_module(f"finetuner.plan.{engine}").plan)
    for engine in engines:
        assert callable(import_module(f"finetuner.parallel.{engine}").build)


def test_ranks_of_one_row_are_one_data_parallel_rank():
    """Context and tensor ranks lie innermost: they share rows, and so their rank among the data."""
    plan = ParallelPlan("fsdp", replicate=2, shard=2, context=2, tensor=2, fsdp=FsdpOptions())
    assert plan.world_size == 16 and plan.data_parallel == 4
    ranks = [plan.data_parallel_rank(rank) for rank in range(plan.world_size)]
    assert ranks == [rank // 4 for rank in range(16)]
