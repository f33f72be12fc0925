"""resize_token_embeddings_to_32x: tables of a multiple of 32 rows, which are saved, merged and read again whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.results import weights_of
from support.rows import RecipeWriter

from finetuner.errors import ModelError
from finetuner.models.embeddings import rows_for_tokens
from finetuner.recipe import load

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TO_32X = {"resize_token_embeddings_to_32x": True, "max_steps": 1, "micro_batch_size": 2}


def test_rows_go_up_to_a_multiple_of_32() -> None:
    assert [rows_for_tokens(n, to_32x=True) for n in (1, 32, 33, 513)] == [32, 32, 64, 544]
    assert rows_for_tokens(513, to_32x=False) == 513


@pytest.mark.slow
def test_a_whole_model_is_saved_and_resumed_with_all_rows(
    write_recipe: RecipeWriter, train: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = write_recipe(tokens=["<|new|>"], save_steps=1, **TO_32X)
    train(recipe)
    weights = weights_of(tmp_path / "out")
    assert [tuple(weights[name].shape) for name in TABLES] == [(544, 48)] * 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 544
    train(recipe, "resume_from_checkpoint=true", "max_steps=2")
    assert weights_of(tmp_path / "out")[TABLES[0]].shape == (544, 48)


@pytest.mark.slow
def test_rows_without_a_token_take_part_in_the_loss_as_rows_of_the_mean(
    write_recipe: RecipeWriter, train: Any, tmp_path: Path
) -> None:
    """As in Axolotl, which does not mask them."""
    recipe = write_recipe(tokens=["<|new|>"], learning_rate=1e-12, **TO_32X)
    padded = train(recipe, f"output_dir={tmp_path / 'a'}")
    plain = train(recipe, f"output_dir={tmp_path / 'b'}", "resize_token_embeddings_to_32x=false")
    assert padded[0]["loss"] > plain[0]["loss"]
    head = weights_of(tmp_path / "a")["lm_head.weight"]
    assert torch.allclose(head[513:], head[:512].mean(dim=0).expand(31, -1), atol=1e-6)


def test_a_table_with_room_stays_as_it_is(write_recipe: RecipeWriter, train: Any, tmp_path: Path) -> None:
    train(write_recipe(**TO_32X))  # 512 tokens, 512 rows
    assert weights_of(tmp_path / "out")[TABLES[0]].shape == (512, 48)
    train(write_recipe(adapter="lora", **TO_32X), f"output_dir={tmp_path / 'adapter'}")


@pytest.mark.slow
def test_an_adapter_with_its_tables_is_merged_and_read_with_all_rows(
    write_recipe: RecipeWriter, train: Any, tmp_path: Path
) -> None:
    from finetuner.commands.text_model import load_text_model
    from finetuner.export.merge import merge

    recipe = write_recipe(
        adapter="lora", tokens=["<|new|>"], lora_modules_to_save=["embed_tokens", "lm_head"], **TO_32X
    )
    train(recipe)
    assert load_text_model(str(recipe), []).model.get_input_embeddings().weight.shape[0] == 544
    result = merge(load(recipe).recipe)
    assert result.verification is not None
    assert json.loads((result.folder / "config.json").read_text())["vocab_size"] == 544
    merged = weights_of(result.folder)
    assert [tuple(merged[name].shape) for name in TABLES] == [(544, 48)] * 2


def test_rows_that_an_adapter_would_lose_are_refused(write_recipe: RecipeWriter, train: Any) -> None:
    with pytest.raises(ModelError, match=r"(?s)would add 31 rows .*lora_modules_to_save: \[embed_tokens, lm_head\]"):
        train(write_recipe(adapter="lora", tokens=["<|new|>"], **TO_32X))
