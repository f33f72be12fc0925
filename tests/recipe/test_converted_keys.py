"""A converted recipe names every key of the file that it was made of, and has no other."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuner.recipe import load
from finetuner.recipe.convert import convert

TRL = {"model_name_or_path": "org/model", "dataset_name": "org/chats", "output_dir": "out"}
LLAMA_FACTORY = {"model_name_or_path": "org/model", "stage": "sft", "dataset": "rows", "template": "qwen",
                 "output_dir": "out"}  # fmt: skip
EACH = [
    (TRL, {"max_steps": -1}), (TRL, {"push_to_hub": True, "hub_model_id": "a/b"}), (TRL, {"loss_type": "dft"}),
    (TRL, {"dataset_kwargs": {"add_special_tokens": False, "append_concat_token": False}}),
    (TRL, {"resume_from_checkpoint": None, "packing": False, "use_peft": False, "report_to": []}),
    (TRL, {"report_to": ["wandb"], "run_name": "r"}), (TRL, {"load_in_4bit": True, "use_peft": True, "lora_r": 4}),
    (LLAMA_FACTORY, {"packing": False, "neat_packing": False, "dataset_dir": "data"}),
    (LLAMA_FACTORY, {"use_dft_loss": False, "use_eaft_loss": True, "eaft_alpha": 2.0, "mask_history": False}),
    (LLAMA_FACTORY, {"quantization_bit": 4, "double_quantization": True, "quantization_type": "nf4"}),
    (LLAMA_FACTORY, {"finetuning_type": "full", "lora_rank": 8, "create_new_adapter": False, "add_tokens": "a,b"}),
    (LLAMA_FACTORY, {"max_samples": 5, "enable_thinking": False, "default_system": "s", "push_to_hub": False}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "keys"), EACH)
def test_no_key_of_the_file_is_missing_in_what_it_became(
    base: dict[str, Any], keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    (tmp_path / "data" / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "r.yml").write_text(yaml.safe_dump({**base, **keys}))
    text = convert(tmp_path / "r.yml").text
    named = {line.removeprefix("# ").partition(":")[0] for line in text.splitlines()}
    assert {*base, *keys} <= named, text


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028"])
def test_a_value_that_a_remark_quotes_stays_in_its_comment(end: str, tmp_path: Path) -> None:
    keys = {**LLAMA_FACTORY, "dataset_dir": f"d{end}trust_remote_code: true{end}"}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(keys))
    (tmp_path / "o.yml").write_text(convert(tmp_path / "r.yml").text)
    recipe = load(tmp_path / "o.yml", check_files=False).recipe
    assert not recipe.model.trust_remote_code
    assert "trust_remote_code" not in yaml.safe_load((tmp_path / "o.yml").read_text())
