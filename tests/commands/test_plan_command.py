"""`finetuner plan`: the figures of a run before it costs anything."""

import json
import subprocess
import sys

import pytest
from support.places import ROOT
from support.processes import exit_of

from finetuner.commands.plan import readable_duration
from finetuner.errors import PlanError
from finetuner.estimate.training_cost import parse_devices
from finetuner.plan.memory import ModelBytes, without_paged_state
from finetuner.recipe.sections import OptimizerSection


def planned(capsys, *arguments: object) -> dict:
    assert exit_of("plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_gpt2_on_eight_gpus_by_hand(capsys):
    """124M parameters with a vocabulary of 50,304; 10 billion tokens in steps of half a million."""
    found = planned(capsys, ROOT / "examples/gpt2_124m.yml", "--devices", "8xA100", "--mfu", "0.5")
    assert found["parameters"] == 124_475_904 == sum(found["parts"].values())
    assert (found["tokens"], found["steps"]) == (10_000_000_000, 19_074)
    matrices = 12 * 12 * 768 * 768 + 768 * 50_304  # 12 D^2 a layer with its biases aside, and the head
    flops = 1e10 * (6 * matrices + 6 * 12 * 768 * 1024)
    assert found["flops"] == pytest.approx(flops)
    assert found["seconds"] == {"A100": pytest.approx(flops / (8 * 312e12 * 0.5))}
    assert found["bytes"] == {"weights": 4 * 124_475_904, "gradients": 4 * 124_475_904, "optimizer": 8 * 124_475_904}
    assert found["tokens_per_parameter"] == pytest.approx(80.3, abs=0.1)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "bytes_a_weight"),
    [
        ("adamw_torch", "", 8), ("adamw_torch", "amsgrad=true", 12), ("paged_adamw_32bit", "", 8),
        ("adamw_bnb_8bit", "", 2 + 8 / 256), ("lion_32bit", "", 4), ("lion_8bit", "", 1 + 4 / 256),
        ("paged_lion_8bit", "", 1 + 4 / 256), ("muon", "", 5.3), ("sgd", "", 0), ("sgd", "momentum=0.9", 4),
        ("rmsprop", "", 4), ("adagrad", "", 4), ("adafactor", "", 0.01),
    ],
)  # fmt: skip
def test_the_state_of_every_optimizer_is_counted(capsys, optimizer, arguments, bytes_a_weight):
    overrides = [f"optimizer={optimizer}", f"optim_args={arguments or '{}'}", "adam_beta2=0.999"]
    found = planned(capsys, ROOT / "examples/gpt2_124m.yml", *overrides)
    assert found["bytes"]["optimizer"] / 124_475_904 == pytest.approx(bytes_a_weight, rel=0.05, abs=0.01)


def test_a_paged_state_is_no_reason_to_refuse_a_gpu_that_its_driver_can_move_it_from():
    model, paged = ModelBytes(4, 4, 8), OptimizerSection(optimizer="paged_adamw_32bit")
    assert without_paged_state(model, paged, "cuda") == ModelBytes(4, 4, 0)
    assert without_paged_state(model, paged, "cpu") == model  # no driver pages there
    assert without_paged_state(model, OptimizerSection(), "cuda") == model


def test_the_page_says_the_ratio_its_source_and_what_each_rank_keeps(capsys):
    arguments = ("plan", ROOT / "examples/llama_1b.yml", "model.vocabulary=128256", "--devices", "32xH100")
    assert exit_of(*arguments) == 0
    page = capsys.readouterr().out
    assert "1,235,814,400" in page and "20.2; about 20, which are 24,716,288,000 tokens here" in page
    assert "arXiv:2203.15556" in page and "4 copies x 8 ranks each rank keeps 2.5 GB" in page
    assert "on 32 x H100" in page and "at 40% of 989 TFLOP/s" in page


def test_without_a_device_those_are_shown_that_are_known_and_an_unknown_one_is_asked_about(capsys, write_recipe):
    recipe = write_recipe(base_model="from-scratch", model={"preset": "gpt-nano"}, tokenizer="byte", max_steps=10)
    assert set(planned(capsys, recipe)["seconds"]) == {"A100", "H100", "B200"}
    own = planned(capsys, recipe, "device_peak_flops=1e11")  # the recipe's own
    assert own["seconds"] == {"device": pytest.approx(own["flops"] / 0.4e11)}
    assert planned(capsys, recipe, "--flops", "2e11")["seconds"]["device"] == pytest.approx(own["flops"] / 0.8e11)
    with pytest.raises(PlanError, match=r"how fast T4 is, is not known here(.|\n)*--flops 312e12(.|\n)*A100"):
        parse_devices("2xT4", None)
    assert parse_devices("2xT4", 65e12).peak_flops == 65e12
    with pytest.raises(PlanError, match="one device at least"):
        parse_devices("0", None)


def test_a_model_that_is_there_is_counted_from_its_config(capsys, write_recipe, tiny_model, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_model / "config.json").read_text())
    keys = {"base_model": str(tmp_path / "bare"), "max_steps": 10}
    full = planned(capsys, write_recipe(**keys))
    config = json.loads((tiny_model / "config.json").read_text())
    table = config["vocab_size"] * config["hidden_size"]
    assert full["parts"]["embedding"] == full["parts"]["head"] == table and full["parts"]["other"] == 0
    frozen = planned(capsys, write_recipe(**keys, adapter="lora"))
    assert frozen["parts"] == full["parts"] and frozen["flops"] < full["flops"]
    assert frozen["bytes"]["optimizer"] == 0 < full["bytes"]["optimizer"]
    unknown = planned(capsys, write_recipe(base_model=str(tmp_path / "bare")))  # by epochs: the rows decide
    assert unknown["tokens"] is None and unknown["flops"] is None
    (tmp_path / "bare" / "config.json").write_text("{}")
    assert exit_of("plan", write_recipe(**keys)) == 2
    assert "cannot be read, or names no causal" in capsys.readouterr().err
    assert exit_of("plan", write_recipe(base_model="models/absent", max_steps=1)) == 2
    assert "taken for a hub id) cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3.0 seconds"), (300, "5.0 minutes"), (7200, "2.0 hours"), (864_000, "10.0 days")]
)
def test_time_is_said_in_the_unit_that_fits(seconds, text):
    assert readable_duration(seconds) == text


def test_a_plan_from_scratch_needs_no_torch():
    code = (
        "import sys; from finetuner import cli\n"
        "try: cli.main(['plan', 'examples/gpt_stdlib.yml'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "3,000,000 in 1,303 steps, if every row is full" in done.stdout, done.stderr
