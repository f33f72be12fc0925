"""A base in 4 bits: bitsandbytes' numbers, in a layer that anything can shard, move and save."""

import itertools
import json
import shutil
import sys

import bitsandbytes as bnb
import pytest
import torch
from support.documents import FP32, documents
from support.processes import run_command
from support.quantized_worker import qlora_loss, steps_of
from support.results import largest_difference, weights_of
from support.tiny import make_model

from finetuner.data.batches import collate
from finetuner.errors import CheckpointError, ModelError, RecipeError
from finetuner.models.activation_checkpointing import recompute_activations
from finetuner.models.adapter import add_lora
from finetuner.models.four_bit_linear import FourBitLinear
from finetuner.models.load import load_model
from finetuner.models.quant_format import QuantFormat, choose_quant_format
from finetuner.models.quant_record import read_record
from finetuner.models.quantized_layers import quantized_layers
from finetuner.models.trainable import count_parameters
from finetuner.objectives.logits import head_is_composable
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.recipe import load_recipe
from finetuner.recipe.sections import AdapterSection, FourBitSection, QuantizationSection

NF4 = QuantFormat("nf4", torch.float32, double=True, compute_dtype=torch.float32)
SHAPES = [(96, 48), (7, 5), (2048, 300)]  # (in, out): whole blocks, less than one, three pieces


def pair(sizes, kind, double, dtype, bias) -> tuple[FourBitLinear, torch.nn.Module]:
    """Ours and bitsandbytes' layer of the same weights."""
    torch.manual_seed(0)
    weight = (torch.randn(sizes[1], sizes[0]) * 0.02).to(dtype)
    offset = torch.randn(sizes[1]).to(dtype) if bias else None
    theirs = bnb.nn.Linear4bit(*sizes, bias, compute_dtype=dtype, compress_statistics=double, quant_type=kind)
    theirs.weight = bnb.nn.Params4bit(weight.clone(), compress_statistics=double, quant_type=kind, module=theirs)
    if bias:
        theirs.bias = torch.nn.Parameter(offset.clone(), requires_grad=False)
    return FourBitLinear.quantize(weight, QuantFormat(kind, dtype, double, dtype), offset), theirs.to("cpu").train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "double"), list(itertools.product(["nf4", "fp4"], [True, False])))
def test_weights_products_and_input_gradients_are_bitsandbytes_bit_for_bit(kind, double, dtype):
    for sizes, bias in itertools.product(SHAPES, [True, False]):
        ours, theirs = pair(sizes, kind, double, dtype, bias)
        weight = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
        assert torch.equal(ours.dequantize(), weight) and weight.dtype == dtype
        left = torch.randn(3, 4, sizes[0]).to(dtype).requires_grad_()
        right = left.detach().clone().requires_grad_()
        one, other = ours(left), theirs(right)
        grad = torch.randn_like(one)
        one.backward(grad)
        other.backward(grad)
        assert torch.equal(one, other) and torch.equal(left.grad, right.grad)


def test_a_large_layer_takes_four_bits_and_an_eighth_a_weight():
    layer = FourBitLinear.quantize(torch.randn(1024, 1024), NF4)
    bits = 8 * layer.num_bytes / 1024**2
    assert 4 + 8 / 64 < bits < 4 + 8 / 64 + 0.01
    assert [p.numel() for p in layer.parameters()] == [layer.num_bytes], "one parameter, nothing beside it"


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
def test_bytes_survive_saving_moving_and_casting(storage):
    form = QuantFormat("nf4", torch.float32, double=True, storage=storage)
    layer = FourBitLinear.quantize(torch.randn(48, 96), form)
    weight = layer.dequantize()
    fresh = FourBitLinear.quantize(torch.zeros(48, 96), form)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.dequantize(), weight)
    cast = layer.to(torch.float16)
    if storage == torch.uint8:
        assert torch.equal(cast.dequantize(), weight)
    else:
        with pytest.raises(ModelError, match="an engine cast or cut them"):
            cast.dequantize()


@pytest.fixture(scope="module")
def four_bit(tiny_model):
    def build(form: QuantFormat = NF4, folder=tiny_model):
        return load_model(str(folder), dtype=form.dtype, attention=("sdpa",), quant_format=form)

    return build


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_linear_layer_but_the_head_is_quantized(tied, tiny_model, tied_model, four_bit):
    folder = tied_model if tied else tiny_model
    model, full = four_bit(folder=folder), load_model(str(folder), **FP32)
    layers = quantized_layers(model)
    names = [n for n, m in full.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert list(layers) == names and len(names) == 14
    for name, layer in layers.items():
        exact = full.get_submodule(name).weight
        assert torch.equal(layer.dequantize(), FourBitLinear.quantize(exact.detach(), NF4).dequantize())
    rest = {n: p for n, p in full.named_parameters() if n.removesuffix(".weight") not in names}
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in rest.items())
    assert count_parameters(model)[1] == count_parameters(full)[1], "packed weights count as what they stand for"
    assert not hasattr(model.config, "quantization_config"), "what is left is an ordinary model"


def test_logits_are_those_of_bitsandbytes_own_layers(tiny_model, four_bit):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, quantization_config=config)
    ids = torch.arange(20)[None]
    assert torch.equal(four_bit().train()(input_ids=ids).logits, theirs.train()(input_ids=ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_adapts_it_as_any_linear_layer_and_the_gradients_are_those_of_the_dequantized_model(
    checkpointing, tiny_model, four_bit
):
    def gradients(model) -> dict[str, torch.Tensor]:
        if checkpointing:
            recompute_activations(model)
        composed = head_is_composable(model)
        adapted = add_lora(model, AdapterSection(adapter="qlora"), base_model="x", seed=1).train()
        torch.manual_seed(2)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        loss = LossModule(adapted, NextToken(), composed=composed)(collate(documents(), [0, 1, 2]).tensors())
        loss.backward()
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None} | {"loss": loss.detach()}

    ours = four_bit()
    dequantized = load_model(str(tiny_model), **FP32)
    for name, layer in quantized_layers(ours).items():
        dequantized.get_submodule(name).weight.data = layer.dequantize()
    one, other = gradients(ours), gradients(dequantized)
    assert len(one) == 29 and all("lora_" in name for name in one if name != "loss")
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    from peft.tuners.lora.layer import Linear

    adapted = {type(m) for m in ours.modules() if hasattr(m, "lora_A")}
    assert adapted == {Linear}, "no path of PEFT's that knows bitsandbytes"


@pytest.mark.slow
def test_two_ranks_of_fsdp_hold_half_the_bytes_and_take_the_steps_of_one(tiny_model):
    """Whatever the bytes pass as, and with a mixed precision that casts every other parameter."""
    cases = {"uint8-fp32": 1e-6, "uint8-bf16": 2e-3, "bfloat16-bf16": 2e-3}
    done = run_command("support.quantized_worker", tiny_model, *cases, ranks=2)
    assert done.code == 0, done.text
    sharded = json.loads(done.out.partition("LOSSES ")[2])
    for case, bound in cases.items():
        alone = steps_of(qlora_loss(str(tiny_model), *case.split("-")))
        assert sharded[case] == pytest.approx(alone, rel=bound)
        assert alone[2] < 0.97 * alone[0], "it learns"


QLORA = {"adapter": "qlora", "lora_r": 4, "learning_rate": 0.02, "micro_batch_size": 4}


@pytest.mark.parametrize(
    ("adapter", "section", "expected"),
    [
        (None, {}, None),
        ("lora", {}, None),
        ("lora", {"load_in_8bit": True}, "8-bit"),
        ("qlora", {}, "4-bit nf4, double quantized"),
        ("qlora", {"bnb_config_kwargs": FourBitSection(bnb_4bit_quant_type="fp4")}, "4-bit fp4, double quantized"),
        ("qlora", {"bnb_config_kwargs": FourBitSection(bnb_4bit_use_double_quant=False)}, "4-bit nf4"),
    ],
)
def test_what_the_recipe_says_of_the_base(adapter, section, expected):
    form = choose_quant_format(adapter, QuantizationSection(**section), torch.bfloat16)
    assert form is None if expected is None else str(form) == expected


def test_products_are_in_the_compute_dtype_and_come_back_in_the_inputs():
    block = FourBitSection(bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="float16")
    form = choose_quant_format("qlora", QuantizationSection(bnb_config_kwargs=block), torch.float32)
    layer = FourBitLinear.quantize(torch.randn(64, 64), form)
    x = torch.randn(2, 64)
    expected = torch.nn.functional.linear(x.bfloat16(), layer.dequantize().bfloat16()).float()
    assert torch.equal(layer(x), expected) and layer.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter": "qlora", "load_in_4bit": False}, "adapter: qlora trains on a 4-bit base"),
        ({"load_in_4bit": True}, "Add `adapter: qlora`"),
        ({"load_in_8bit": True}, "Add `adapter: lora`"),
        ({"adapter": "qlora", "load_in_8bit": True}, "Write `adapter: lora` for 8 bits"),
        (
            {"adapter": "lora", "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
            "has no effect without `adapter: qlora`",
        ),
    ],
)
def test_contradictions_name_both_lines(keys, message, write_recipe):
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(**keys))
    assert message in str(error.value)
    assert all(f"| {key}:" in str(error.value) for key in keys)


def test_the_other_name_of_the_block_is_taken(write_recipe):
    recipe = load_recipe(write_recipe(adapter="qlora", load_in_4bit=True, bnb_config={"bnb_4bit_quant_type": "fp4"}))
    assert recipe.quantization.bnb_config_kwargs.bnb_4bit_quant_type == "fp4"


def test_a_missing_bitsandbytes_is_named_with_the_command(write_recipe, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'finetuner\[quantize\]'"):
        train(write_recipe(**QLORA))


@pytest.mark.slow
def test_a_quantized_run_resumes_bitwise_and_only_on_the_same_base(write_recipe, train, tmp_path, capsys):
    recipe = write_recipe(**QLORA, max_steps=4, save_steps=2, gradient_checkpointing=True)
    unbroken = train(recipe)
    assert "4-bit nf4, double quantized: 14 linear layers, 42.8% of the weights" in capsys.readouterr().out
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "out/checkpoints/step-00000002", broken / "checkpoints/step-00000002")
    resumed = train(recipe, f"output_dir={broken}", "resume_from_checkpoint=true")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in unbroken[2:]]
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(broken)) == 0.0
    again = ("overwrite_output_dir=false", "resume_from_checkpoint=true", "max_steps=5", f"output_dir={broken}")
    with pytest.raises(CheckpointError, match="bnb_config_kwargs"):
        train(recipe, *again, "bnb_config_kwargs.bnb_4bit_use_double_quant=false")
    with pytest.raises(CheckpointError, match="was loaded as 4-bit nf4, double quantized of float32"):
        train(recipe, *again, "bf16=true")


def test_the_record_beside_the_adapter_names_what_was_quantized(write_recipe, train, tmp_path):
    train(write_recipe(**QLORA, max_steps=1, bnb_config_kwargs={"bnb_4bit_quant_type": "fp4"}))
    record = read_record(tmp_path / "out")
    assert record == read_record(tmp_path / "out" / "checkpoints" / "step-00000001")
    assert (record.kind, record.double, record.dtype) == ("fp4", True, "float32")
    assert "model.layers.1.mlp.down_proj" in record.modules and len(record.modules) == 14
    train(write_recipe(**QLORA | {"adapter": "lora"}, max_steps=1), "overwrite_output_dir=true")
    assert read_record(tmp_path / "out") is None, "a full base is not said to be quantized"


def test_a_base_in_eight_bits_trains_lora(write_recipe, train, tmp_path):
    exact = train(write_recipe(**QLORA | {"adapter": "lora"}, max_steps=2))
    rows = train(
        write_recipe(**QLORA | {"adapter": "lora"}, load_in_8bit=True, max_steps=2), f"output_dir={tmp_path / '8'}"
    )
    assert [r["loss"] for r in rows] != [r["loss"] for r in exact]
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in exact], rel=0.01)
    record = read_record(tmp_path / "8")
    assert record.kind == "int8" and len(record.modules) == 14


def test_what_cannot_be_kept_in_four_bits_is_refused(tmp_path, tokenizer_folder, four_bit):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="Conv1D"):
        four_bit(folder=tmp_path / "gpt2")
    base = make_model(tmp_path / "base", tokenizer_folder)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantized already"):
        four_bit(folder=base)
