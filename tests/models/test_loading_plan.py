"""The way a base model gets into memory, as a table: from plain values, without a model."""

from pathlib import Path

import pytest
import torch
from support.tiny import make_model

from finetuner.errors import ModelError
from finetuner.models.loading_plan import Loading, LoadingPlan, choose_loading, load_base
from finetuner.plan.parallel import FsdpOptions, ParallelPlan, ZeroOptions
from finetuner.recipe.sections import QuantizationSection

CPU = torch.device("cpu")
CHECKPOINT = Path("out/checkpoints/step-00000002")
LAZY_SHARDED, LAZY_FULL, MAIN_RANK, EVERY_RANK = Loading

DDP = ParallelPlan(replicate=2)
FSDP = ParallelPlan(engine="fsdp", shard=2, fsdp=FsdpOptions())
FSDP_MAIN_READS = ParallelPlan(engine="fsdp", shard=2, fsdp=FsdpOptions(main_rank_reads=True))
ZERO_2 = ParallelPlan(engine="zero", shard=2, zero=ZeroOptions(stage=2, config={}))
ZERO_3 = ParallelPlan(engine="zero", shard=2, zero=ZeroOptions(stage=3, config={}))


def choose(parallel: ParallelPlan = DDP, checkpoint: Path | None = None, **keys) -> LoadingPlan:
    plain = {
        "adapter": "lora", "checkpoint_is_sharded": False, "quantization": QuantizationSection(), "precision": "bf16",
    }  # fmt: skip
    return choose_loading("base", checkpoint, parallel=parallel, **plain | keys)


@pytest.mark.parametrize(
    ("parallel", "keys", "ways"),
    [
        (DDP, {}, (LAZY_FULL, EVERY_RANK)),
        (ZERO_2, {}, (LAZY_FULL, EVERY_RANK)),
        (ZERO_3, {}, (LAZY_SHARDED, EVERY_RANK)),
        (FSDP, {}, (LAZY_SHARDED, EVERY_RANK)),
        (FSDP_MAIN_READS, {}, (LAZY_SHARDED, MAIN_RANK)),
        # code that comes with a model, and LLM.int8, are loaded by transformers alone
        (FSDP, {"trust_remote_code": True}, (EVERY_RANK,)),
        (FSDP_MAIN_READS, {"trust_remote_code": True}, (MAIN_RANK,)),
        (DDP, {"quantization": QuantizationSection(load_in_8bit=True)}, (EVERY_RANK,)),
        # transformers quantizes while it loads, and an empty model has nothing to quantize
        (FSDP_MAIN_READS, {"adapter": "qlora"}, (LAZY_SHARDED, EVERY_RANK)),
        (FSDP_MAIN_READS, {"quantization": QuantizationSection(load_in_8bit=True)}, (EVERY_RANK,)),
        # shards of a full model are read once it is sharded; those of an adapter leave the base alone
        (FSDP, {"adapter": None, "checkpoint": CHECKPOINT, "checkpoint_is_sharded": True}, (EVERY_RANK,)),
        (FSDP, {"checkpoint": CHECKPOINT, "checkpoint_is_sharded": True}, (LAZY_SHARDED, EVERY_RANK)),
        (FSDP_MAIN_READS, {"checkpoint": CHECKPOINT, "checkpoint_is_sharded": True}, (LAZY_SHARDED, EVERY_RANK)),
    ],
)  # fmt: skip
def test_the_ways_to_load_follow_from_the_engine_and_the_base(parallel, keys, ways):
    assert choose(parallel, **keys).ways == ways


@pytest.mark.parametrize(
    ("adapter", "checkpoint", "sharded", "source"),
    [
        (None, None, False, "base"),
        ("lora", None, False, "base"),
        ("lora", CHECKPOINT, False, "base"),
        ("lora", CHECKPOINT, True, "base"),
        (None, CHECKPOINT, False, str(CHECKPOINT)),
        (None, CHECKPOINT, True, "base"),
    ],
)
def test_only_full_fine_tuning_reads_the_base_from_a_checkpoint_that_has_it_in_one(
    adapter, checkpoint, sharded, source
):
    assert choose(checkpoint=checkpoint, adapter=adapter, checkpoint_is_sharded=sharded).source == source


def test_what_is_trained_is_loaded_in_fp32_and_what_is_frozen_in_the_runs_precision():
    assert choose(adapter=None).dtype == torch.float32
    assert choose(adapter="lora").dtype == torch.bfloat16
    assert choose(adapter="lora", precision="fp32").dtype == torch.float32
    assert choose(adapter="qlora").quant_format.dtype == torch.bfloat16


def test_deepspeed_casts_what_it_shards_so_the_empty_model_has_its_dtype_already():
    assert choose(ZERO_3, adapter=None).empty_dtype == torch.bfloat16
    assert choose(ZERO_2, adapter=None).empty_dtype is None and choose(FSDP, adapter=None).empty_dtype is None
    assert choose(DDP).full_weights_on_device and not choose(ZERO_2).full_weights_on_device


@pytest.mark.parametrize(
    ("ways", "is_main_rank", "lazy", "has_weights"),
    [
        ((LAZY_SHARDED, EVERY_RANK), False, True, False),
        ((LAZY_FULL, EVERY_RANK), False, False, True),
        ((MAIN_RANK,), True, False, True),
        ((MAIN_RANK,), False, False, False),
        ((EVERY_RANK,), False, False, True),
    ],
)
def test_every_way_gives_the_model_with_its_weights_or_with_room_for_them(
    ways, is_main_rank, lazy, has_weights, tied_model, tmp_path
):
    from transformers import AutoModelForCausalLM

    plan = LoadingPlan(str(tied_model), torch.float32, None, ways)
    model, weights = load_base(
        plan, attention=("sdpa",), device=CPU, is_main_rank=is_main_rank, prepared_path=str(tmp_path)
    )
    expected = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert (weights is not None) == lazy and model.lm_head.weight is model.model.embed_tokens.weight
    if has_weights:
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_base_whose_files_name_other_tensors_is_loaded_the_last_way_and_cannot_be_cached(tokenizer_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "base", tokenizer_folder)
    tensors = load_file(folder / "model.safetensors")  # "model." is what transformers itself adds to such names
    old = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    keys = {"attention": ("sdpa",), "device": CPU, "is_main_rank": True, "prepared_path": str(tmp_path)}
    model, weights = load_base(LoadingPlan(str(folder), torch.float32, None, (LAZY_SHARDED, EVERY_RANK)), **keys)
    assert weights is None
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    plan = LoadingPlan(str(folder), torch.float32, None, (LAZY_SHARDED, EVERY_RANK), caches_quantized=True)
    with pytest.raises(ModelError, match="quantized_cache: false"):
        load_base(plan, **keys)
