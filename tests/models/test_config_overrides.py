"""overrides_of_model_config: a run is that of a base with the edited config.json, and its results carry it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_command
from support.results import largest_difference, weights_of
from support.rows import RecipeWriter

from finetuner.errors import CheckpointError, FinetunerError, ModelError, RecipeError
from finetuner.models.config_overrides import changed_config
from finetuner.recipe import load

ROPE = {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}


def edited(base: Path, folder: Path, **values: Any) -> Path:
    """A copy of the base whose config.json somebody has edited."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (ROPE, {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
        ),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 10_000.0}),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
        ),
        (  # the length before it was scaled is that of the base, also where the length is changed too
            {"max_position_embeddings": 8192, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 2048},
        ),
    ],
)
def test_rope_theta_and_rope_scaling_become_what_the_config_has(
    overrides: dict[str, Any], written: dict[str, Any], tiny_model: Path
) -> None:
    assert changed_config(str(tiny_model), overrides).rope_parameters == written


def test_values_of_a_text_model_within_another_are_found(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3TextConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    text = Gemma3TextConfig(**sizes, num_key_value_heads=1, vocab_size=64, sliding_window=64)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma3Config(text_config=text.to_dict(), vision_config=vision).save_pretrained(tmp_path)
    for overrides in ({"attention_dropout": 0.25}, {"text_config": {"attention_dropout": 0.25}}):
        assert changed_config(str(tmp_path), overrides).text_config.attention_dropout == 0.25
    with pytest.raises(ModelError, match=r"for each of: .*sliding_attention"):
        changed_config(str(tmp_path), {"rope_theta": 1e6})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"rope_tetha": 5e5}, "has no key 'rope_tetha'.*Did you mean"),
        ({"attention_droput": 0.1}, "Did you mean 'attention_dropout'"),
        ({"attention_dropout": "a lot"}, "attention_dropout is 'a lot', which the config does not take"),
        ({"attention_bias": 1}, "attention_bias is 1, which the config does not take; in the base it is False"),
        ({"hidden_size": 96}, "would change the weights themselves"),
        ({"num_hidden_layers": 1}, "would change the weights themselves"),
        ({"vocab_size": 1024}, "would change the weights themselves"),
        ({"tie_word_embeddings": True}, "would change the weights themselves"),
        ({"hidden_act": "selu6"}, "no model can be built"),
        ({"rope_scaling": {"type": "liner", "factor": 2.0}}, "rope_type is 'liner'.*Did you mean 'linear'"),
        ({"rope_scaling": "linear"}, "must be a block"),
        ({"rope_theta": "big"}, "rope_theta is 'big', but must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
    ],
)
def test_what_no_model_of_these_weights_has_is_refused(
    overrides: dict[str, Any], said: str, tiny_model: Path, write_recipe: RecipeWriter, train: Any
) -> None:
    with pytest.raises(FinetunerError, match=f"(?s){said}"):
        train(write_recipe(overrides_of_model_config=overrides, datasets=[{"path": "none/there", "type": "alpaca"}]))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("torch_dtype", "bfloat16", "write bf16 or fp16"),
        ("pad_token_id", 0, "under special_tokens"),
        ("output_router_logits", True, "'output_router_logits' is not supported yet: the loss of a router"),
        ("output_attentions", True, "training reads no such value"),
    ],
)
def test_keys_that_belong_elsewhere_are_refused_before_anything_is_read(
    key: str, value: Any, said: str, write_recipe: RecipeWriter
) -> None:
    with pytest.raises(RecipeError, match=said):
        load(write_recipe(overrides_of_model_config={key: value}))


def test_the_names_of_older_recipes_are_one_block(write_recipe: RecipeWriter) -> None:
    block = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}, "attention_dropout": 0.1}
    for keys in (
        {"overrides_of_model_config": block},
        {"model_config": block},
        {"rope_theta": 5e5, "rope_scaling": block["rope_scaling"], "model_config": {"attention_dropout": 0.1}},
    ):
        assert load(write_recipe(**keys)).recipe.model.overrides_of_model_config == block


@pytest.mark.slow
def test_a_run_is_that_of_a_base_with_the_edited_config(
    write_recipe: RecipeWriter, train: Any, tiny_model: Path, tmp_path: Path
) -> None:
    by_hand = edited(tiny_model, tmp_path / "edited", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    keys = {"max_steps": 2, "micro_batch_size": 2}
    ours = train(write_recipe(overrides_of_model_config={"rope_theta": 100.0}, **keys), f"output_dir={tmp_path / 'a'}")
    theirs = train(write_recipe(base_model=str(by_hand), **keys), f"output_dir={tmp_path / 'b'}")
    plain = train(write_recipe(**keys), f"output_dir={tmp_path / 'c'}")
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert ours[0]["loss"] != plain[0]["loss"]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    assert config_of(tmp_path / "a")["rope_parameters"]["rope_theta"] == 100.0


@pytest.mark.slow
def test_merging_and_generating_use_the_config_that_was_trained_with(
    write_recipe: RecipeWriter, train: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from finetuner.commands.text_model import load_text_model
    from finetuner.export.merge import merge

    recipe = write_recipe(adapter="lora", overrides_of_model_config={"rope_theta": 100.0}, max_steps=1)
    train(recipe)
    result = merge(load(recipe).recipe)
    assert result.verification is not None
    assert config_of(result.folder)["rope_parameters"]["rope_theta"] == 100.0
    model = load_text_model(str(recipe), []).model
    assert model.get_base_model().config.rope_parameters["rope_theta"] == 100.0
    by_itself = load_text_model(str(tmp_path / "out"), []).model  # the adapter's folder names the changed base
    assert by_itself.get_base_model().config.rope_parameters["rope_theta"] == 100.0


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_config(write_recipe: RecipeWriter, train: Any, tmp_path: Path) -> None:
    recipe = write_recipe(max_steps=2, save_steps=1, overrides_of_model_config={"rope_theta": 100.0})
    train(recipe, "max_steps=1")
    with pytest.raises(CheckpointError, match="overrides_of_model_config"):
        train(recipe, "resume_from_checkpoint=true", "overrides_of_model_config.rope_theta=200.0")
    train(recipe, "resume_from_checkpoint=true")


@pytest.mark.slow
@pytest.mark.matrix
def test_every_rank_has_the_changed_config(write_recipe: RecipeWriter, train: Any, tmp_path: Path) -> None:
    recipe = write_recipe(overrides_of_model_config={"rope_theta": 100.0}, max_steps=2, micro_batch_size=2)
    alone = train(recipe, "micro_batch_size=4", f"output_dir={tmp_path / 'one'}")
    done = run_command(
        "finetuner.train", recipe, f"output_dir={tmp_path / 'two'}", 'fsdp=["full_shard","auto_wrap"]', ranks=2
    )
    assert done.code == 0, done.text
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
