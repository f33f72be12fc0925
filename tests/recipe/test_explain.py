"""The reference of the recipe: for a person, for an editor, and as a page; all made from the schema."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from support.places import ROOT

from finetuner.cli import main
from finetuner.errors import RecipeError
from finetuner.recipe import KEYS, load
from finetuner.recipe.explain import default_of, explain, json_schema, reference, type_of
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.schema import FACTS, SECTIONS
from finetuner.recipe.sections.facts import KeyFacts, facts_of

EXAMPLES = sorted((ROOT / "examples").rglob("*.y*ml"))


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_is_explained_with_meaning_type_and_default(key: str) -> None:
    text = explain(key)
    info = KEYS[key][1]
    assert info.description
    assert info.description in text
    for line in (f"  type      {type_of(info)}", f"  default   {default_of(info)}", "  Axolotl   "):
        assert line in text
    assert type_of(info) not in ("", "anything")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("learning_rate", "number > 0 (per step)"),
        ("sequence_len", "whole number >= 2 (tokens)"),
        ("bf16", "auto | true | false"),
        ("lora_dropout", "number >= 0, < 1 (probability)"),
        ("warmup_ratio", "number >= 0, <= 1 (fraction of 1)"),
        ("tokens", "a list of text"),
        ("special_tokens", "a block"),
        ("base_model", "text"),
    ],
)
def test_types_are_said_in_words_with_bounds_and_unit(key: str, said: str) -> None:
    assert type_of(KEYS[key][1]) == said


def test_the_defaults_of_an_adapter_that_names_nothing_are_said(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(
        "base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: a/b, type: alpaca}]\nadapter: lora\nlora_alpha: 8\n"
    )
    loaded = load(path)
    assert "default   16" in explain("lora_r", loaded)
    assert "here      not set: the default" in explain("lora_r", loaded)
    assert "default   32" in explain("lora_alpha", loaded)
    assert f"here      8, set at {path}:5:1" in explain("lora_alpha", loaded)
    assert "every linear layer" in explain("lora_target_modules", loaded)


def test_an_override_is_where_a_value_was_set(tmp_path: Path, capsys) -> None:
    path = tmp_path / "r.yml"
    path.write_text("base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: a/b, type: alpaca}]\n")
    with pytest.raises(SystemExit) as done:
        main(["explain", "learning_rate", str(path), "learning_rate=2e-3"])
    assert done.value.code == 0
    assert "here      0.002, set at <override 1>" in capsys.readouterr().out


def test_blocks_are_explained_to_their_keys() -> None:
    assert "pad_token  Fills up short rows" in explain("special_tokens")
    assert "Fills up short rows" in explain("special_tokens.pad_token")
    assert "Which split" in explain("datasets.0.split")
    with pytest.raises(RecipeError, match="Did you mean 'split'"):
        explain("datasets.splt")


def test_a_word_that_is_no_key_is_corrected_and_another_tools_key_is_explained() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'lora_r'"):
        explain("lora_rr")
    assert "read as attn_implementation: auto" in explain("flash_attention")
    assert "accepted, without effect" in explain("wandb_watch")
    assert "not supported yet: preference" in explain("rl")


def test_the_page_is_current() -> None:
    page = ROOT / "docs" / "recipe.md"
    assert page.read_text() == reference(), "write it anew: finetuner schema --markdown > docs/recipe.md"


def test_the_schema_file_is_current() -> None:
    file = ROOT / "docs" / "recipe.schema.json"
    assert json.loads(file.read_text()) == json_schema(), "write it anew: finetuner schema > docs/recipe.schema.json"


def test_every_key_says_its_facts_and_a_key_without_them_is_refused() -> None:
    assert set(FACTS) == set(KEYS)
    assert {facts.resume for facts in FACTS.values()} == {"must_match", "free", "noted"}
    assert {key for key in FACTS if not FACTS[key].prepared_rows} < set(SECTIONS["data"].model_fields)
    for key, facts in FACTS.items():
        assert (facts.needs is None) == (not key.startswith(("lora_", "peft_", "loraplus_", "bnb_"))), key
        assert len([fact for fact in KEYS[key][1].metadata if isinstance(fact, KeyFacts)]) == 1
    names = [name for facts in FACTS.values() for name in facts.aliases]
    assert len(names) == len(set(names)) and not set(names) & set(KEYS)
    with pytest.raises(TypeError, match="the key 'rank' does not say its KeyFacts"):
        facts_of("rank", FieldInfo(annotation=int, default=1))


def test_every_key_is_on_the_page_and_in_the_schema() -> None:
    page, properties = reference(), json_schema()["properties"]
    for key in [*KEYS, *MEANINGS]:
        assert f"| `{key}` |" in page
        assert key in properties


def test_the_schema_is_one_and_says_of_every_example_that_it_is_right() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    for example in EXAMPLES:
        assert list(validator.iter_errors(YAML(typ="safe", pure=True).load(example.read_text()))) == [], example


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rat": 1e-4}, {"lora_r": "8"}, {"bf16": "yes"}, {"micro_batch_size": 0}, {"datasets": [{"pth": "x"}]}],
)
def test_the_schema_refuses_what_the_recipe_refuses(wrong: dict) -> None:
    right = {"base_model": "a/b", "learning_rate": 1e-4, "datasets": [{"path": "a/b", "type": "alpaca"}]}
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not list(validator.iter_errors(right))
    assert list(validator.iter_errors(right | wrong))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_tell_an_editor_where_the_schema_is(example: Path) -> None:
    first = example.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (example.parent / first.partition("=")[2]).resolve() == ROOT / "docs" / "recipe.schema.json"


def test_check_explain_and_convert_load_nothing_heavy(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text("base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: a/b, type: alpaca}]\n")
    for command in (["check", str(recipe)], ["explain", "lora_r", str(recipe)], ["schema"], ["convert", str(recipe)]):
        code = (
            "import sys\nfrom finetuner.cli import main\n"
            f"try: main({command!r})\nexcept SystemExit as e: assert e.code == 0, e.code\n"
            "assert not {'torch', 'transformers', 'datasets', 'numpy', 'deepspeed'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
