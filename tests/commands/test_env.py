"""`finetuner env`: a report that can be pasted into an issue, from machines that work and from machines that do not."""

import json
import os
import subprocess
import sys

import pytest
from support.places import ROOT

import finetuner
from finetuner import cli
from finetuner.commands.env import as_text, describe_environment
from finetuner.world import launcher_variables


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["env", *map(str, arguments)])
    assert not stopped.value.code
    return capsys.readouterr().out


def test_the_report_has_versions_devices_variables_and_the_check_of_the_recipe(write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = write_recipe()
    facts = json.loads(printed(capsys, recipe, "--json"))
    assert facts["versions"]["finetuner"] == finetuner.__version__
    assert facts["packages"]["torch"] and facts["packages"]["pydantic"]
    assert facts["devices"]["device"] == "cpu" and facts["devices"]["CPU threads"] == 3
    assert facts["variables"]["OMP_NUM_THREADS"] == "3"
    assert facts["recipe"] == {"file": str(recipe), "check": f"{recipe}: no mistakes"}
    text = printed(capsys, recipe)
    for block in facts.values():
        for name, value in block.items():
            assert f"  {name} " in text and str("not installed" if value is None else value) in text


def test_a_recipe_with_mistakes_is_reported_and_does_not_fail_the_report(write_recipe, capsys):
    text = printed(capsys, write_recipe(learning_rat=1e-3))
    assert "unknown key 'learning_rat'. Did you mean 'learning_rate'?" in text
    assert "there is no recipe 'nowhere.yml'" in printed(capsys, "nowhere.yml")


def test_no_secret_is_in_the_report(write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mysecret")
    monkeypatch.setenv("ACCELERATE_API_KEY", "mysecret")
    monkeypatch.setenv("NCCL_PROXY", "http://me:mysecret@proxy")
    recipe = write_recipe(hub_token="hf_mysecret", mlflow_tracking_uri="https://me:mysecret@host", num_epoch=3)
    text = printed(capsys, recipe)
    assert "mysecret" not in text and "HF_TOKEN" in text and "set, not shown" in text
    assert "mysecret" not in printed(capsys, recipe, "--json")


def test_only_variables_of_launchers_and_libraries_are_named():
    env = {"HOME": "/home/me", "RANK": "0", "FSDP_VERSION": "2", "SLURM_JOB_ACCOUNT": "mine", "NCCL_DEBUG": "INFO"}
    assert launcher_variables(env) == {"FSDP_VERSION": "2", "NCCL_DEBUG": "INFO", "RANK": "0"}
    assert launcher_variables({"TOKENIZERS_PARALLELISM": "false"}) == {"TOKENIZERS_PARALLELISM": "false"}


def test_a_launch_that_lost_its_ranks_is_said_in_place_of_the_devices(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("RANK", raising=False)
    devices = describe_environment()["devices"]
    assert "asked for several processes and started one" in devices["device"]
    assert devices["torch build"] in as_text({"devices": devices})


def test_a_torch_that_cannot_be_imported_is_reported_with_its_reason(tmp_path):
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "finetuner.cli", "env", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["devices"]["device"] == "cannot be read: OSError: libcudart.so.12: cannot open shared object file"
    assert facts["packages"]["transformers"]
