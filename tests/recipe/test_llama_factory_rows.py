"""A conversion of LLaMA-Factory's recipes makes its tokens, labels and losses: recorded, and, where it is, its own."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.places import ROOT

from finetuner.data.first_row import first_row_at_hand
from finetuner.recipe.convert import convert


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location(
        "parity_llama_factory", ROOT / "benchmarks" / "parity_llama_factory.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORDED = json.loads(Path(__file__).with_name("llama_factory_rows.json").read_text())
CASES = [name for name in RECORDED if name != "version"]


@pytest.mark.parametrize("name", CASES)
def test_a_conversion_makes_the_tokens_and_labels_that_llama_factory_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RECORDED: by benchmarks/parity_llama_factory.py --record, with the version that it names."""
    parity = benchmark()
    monkeypatch.chdir(tmp_path)
    parity.write_case(tmp_path, parity.CASES[name], steps=3)
    Path("ours.yml").write_text(convert("lf.yml", first_row=first_row_at_hand).text)
    made = parity.our_rows("ours.yml")[: len(RECORDED[name])]
    assert [ids for ids, _ in made] == [ids for ids, _ in RECORDED[name]]
    assert [labels for _, labels in made] == [labels for _, labels in RECORDED[name]]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*CASES, "dft", "eaft"])  # whose rows are those of cases that are recorded
def test_three_steps_by_llama_factory_and_by_its_conversion_have_the_same_losses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = os.environ.get("LLAMA_FACTORY_PYTHON")
    if python is None:
        pytest.skip("needs llamafactory 0.9.5 in an environment: LLAMA_FACTORY_PYTHON=/path/to/bin/python")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    compared = benchmark().compare(name, python, tmp_path)
    assert compared.differing_rows == []
    assert compared.worst < 1e-4
