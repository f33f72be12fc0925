"""A compiled run is the plain run, up to rounding; what stands in the way of compiling is said."""

import pytest
import torch
from support.processes import run_command
from support.results import largest_difference, weights_of
from transformers import AutoModelForCausalLM

from finetuner.errors import PlanError
from finetuner.models import compilation
from finetuner.models.compilation import compile_layers, wants_compilation
from finetuner.recipe.sections import CompileSection
from finetuner.training.metrics import read_metrics

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON, AUTO = CompileSection(torch_compile=True), CompileSection(torch_compile="auto")


def test_auto_compiles_on_a_gpu_where_nothing_is_in_the_way():
    assert not wants_compilation(CompileSection(), GPU, engine=None, quantized=False)
    assert not wants_compilation(AUTO, CPU, engine=None, quantized=False)
    assert not wants_compilation(AUTO, GPU, engine="deepspeed", quantized=False)
    tracing = CompileSection(torch_compile="auto", torch_compile_backend="eager")
    assert wants_compilation(tracing, GPU, engine="fsdp", quantized=False)
    assert not wants_compilation(tracing, GPU, engine=None, quantized=True)


def test_an_obstacle_is_an_error_where_compiling_was_asked_for(monkeypatch):
    with pytest.raises(PlanError, match=r"not with deepspeed. Use `fsdp`. Or write `torch_compile: false`"):
        wants_compilation(ON, GPU, engine="deepspeed", quantized=False)
    with pytest.raises(PlanError, match="4 or 8 bits"):
        wants_compilation(ON, GPU, engine=None, quantized=True)
    monkeypatch.setattr(compilation, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(PlanError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        wants_compilation(ON, CPU, engine=None, quantized=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_decoder_layer_is_compiled_and_nothing_else(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert compile_layers(model, CompileSection(torch_compile=True, torch_compile_backend="eager")) == 2
    compiled = [name for name, m in model.named_modules() if m._compiled_call_impl is not None]
    assert compiled == ["model.layers.0", "model.layers.1"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.matrix)])
def test_a_compiled_run_has_the_losses_of_the_plain_one(backend, write_recipe, train, tmp_path):
    recipe = write_recipe(adapter="lora", max_steps=2, pad_to_sequence_len=True, gradient_checkpointing=True)
    plain = train(recipe, f"output_dir={tmp_path / 'plain'}")
    keys = ["torch_compile=true", f"torch_compile_backend={backend}", f"output_dir={tmp_path / 'compiled'}"]
    done = run_command("finetuner.train", recipe, *keys)
    assert done.code == 0, done.text
    rows = read_metrics(tmp_path / "compiled" / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain], rel=1e-5)
    assert largest_difference(weights_of(tmp_path / "plain"), weights_of(tmp_path / "compiled")) < 1e-5
