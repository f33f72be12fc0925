"""Other tools' launch lines, `--key=value` and `--key value`, mean what `key=value` means; our own options stay."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.places import ROOT
from support.processes import exit_of, run_command
from support.rows import RecipeWriter

from finetuner.cli import COMMANDS, load_command
from finetuner.commands.option_overrides import read_options_as_overrides
from finetuner.errors import RecipeError
from finetuner.recipe import flat_values, load


def read(*words: str, command: str = "train") -> list[str]:
    found = read_options_as_overrides(load_command(command), list(words))
    return [word for word in found if word != "--"]


LINES: dict[str, tuple[list[str], list[str]]] = {
    "equals": (["r.yml", "--learning_rate=1e-4"], ["r.yml", "learning_rate=1e-4"]),
    "space": (["r.yml", "--learning_rate", "1e-4"], ["r.yml", "learning_rate=1e-4"]),
    "dashes": (["r.yml", "--learning-rate", "1e-4"], ["r.yml", "learning_rate=1e-4"]),
    "before the recipe": (["--deepspeed=ds.json", "r.yml"], ["r.yml", "deepspeed=ds.json"]),
    "value before the recipe": (["--deepspeed", "ds.json", "r.yml"], ["r.yml", "deepspeed=ds.json"]),
    "flag at the end": (["r.yml", "--bf16"], ["r.yml", "bf16=true"]),
    "flag before the recipe": (["--bf16", "r.yml"], ["r.yml", "bf16=true"]),
    "flag before an option": (["r.yml", "--bf16", "--max_steps", "5"], ["r.yml", "bf16=true", "max_steps=5"]),
    "flag before an override": (["r.yml", "--bf16", "max_steps=5"], ["r.yml", "bf16=true", "max_steps=5"]),
    "flag with a value": (["r.yml", "--bf16", "false"], ["r.yml", "bf16=false"]),
    "flag with a name": (["--bf16", "auto", "r.yml"], ["r.yml", "bf16=auto"]),
    "flag or text": (["r.yml", "--resume_from_checkpoint", "out/cp-5"], ["r.yml", "resume_from_checkpoint=out/cp-5"]),
    "no-": (["r.yml", "--no-bf16", "--no_sample_packing"], ["r.yml", "bf16=false", "sample_packing=false"]),
    "negative": (["r.yml", "--max_grad_norm", "-1"], ["r.yml", "max_grad_norm=-1"]),
    "equals in the value": (["r.yml", "--output_dir=a=b"], ["r.yml", "output_dir=a=b"]),
    "dotted": (["r.yml", "--datasets.0.path", "x"], ["r.yml", "datasets.0.path=x"]),
    "list": (
        ["r.yml", "--lora_target_modules", "q_proj", "v_proj", "--bf16"],
        ["r.yml", 'lora_target_modules=["q_proj", "v_proj"]', "bf16=true"],
    ),
    "the last word wins": (
        ["r.yml", "max_steps=1", "--max_steps=2", "max_steps=3"],
        ["r.yml", "max_steps=1", "max_steps=2", "max_steps=3"],
    ),
    "another tool's flag": (["--use_peft", "r.yml"], ["r.yml", "use_peft=true"]),
    "another tool's value": (["--dataset_name", "a/b", "r.yml"], ["r.yml", "dataset_name=a/b"]),
    "a launcher's rank": (["--local_rank=0", "r.yml"], ["r.yml", "local_rank=0"]),
    "plain words": (["r.yml", "learning_rate=1e-4"], ["r.yml", "learning_rate=1e-4"]),
}


@pytest.mark.parametrize("given, expected", LINES.values(), ids=LINES.keys())
def test_an_option_is_an_override(given: list[str], expected: list[str]) -> None:
    assert read(*given) == expected


def test_help_has_a_short_name_behind_a_recipe_too(
    write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of("train", str(write_recipe()), "--bf16", "-h") == 0
    assert "Train as the recipe says" in capsys.readouterr().out


def test_a_commands_own_options_stay_its_own() -> None:
    assert read("r.yml", "--verbose", "--max_steps=2", command="check") == ["--verbose", "r.yml", "max_steps=2"]
    assert read("m", "--prompt", "--x", "--seed=3", "--lr", "1", command="generate") == [
        "--prompt", "--x", "--seed=3", "m", "lr=1",
    ]  # fmt: skip
    assert read("r.yml", "-v", "--help", command="check") == ["-v", "--help", "r.yml"]
    assert read("a.yml", "-o", "b.yml", "--max_steps=2", command="convert") == ["a.yml", "-o", "b.yml", "--max_steps=2"]


def test_a_slip_in_one_of_them_is_still_a_slip(write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("check", write_recipe(), "--verbos") == 2
    assert "--verbose" in capsys.readouterr().err


def test_an_option_without_its_value_says_how_to_write_it() -> None:
    with pytest.raises(RecipeError, match=r"--deepspeed has no value. Write --deepspeed=VALUE"):
        read("r.yml", "--deepspeed")


@pytest.mark.parametrize("command", ["train", "check", "plan", "preview", "data", "merge"])
def test_an_unknown_option_is_an_unknown_key(
    write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for words in (["--learning-rat=1"], ["--learning_rat", "1"], ["--learning_rat"]):
        assert exit_of(command, write_recipe(), *words) == 2
        message = capsys.readouterr().err
        assert "unknown key 'learning_rat'. Did you mean 'learning_rate'?" in message and "Traceback" not in message


def test_every_command_that_takes_overrides_takes_them_as_options() -> None:
    with_overrides = [name for name in COMMANDS if any(p.name == "overrides" for p in load_command(name).params)]
    assert {"train", "merge", "evaluate", "generate", "chat", "explain", "env", "tokenizer"} <= set(with_overrides)
    for name in with_overrides:
        words = ["learning_rate", "r.yml"] if name == "explain" else ["r.yml"]
        assert read(*words, "--learning-rate", "1e-4", command=name) == [*words, "learning_rate=1e-4"]


def test_the_launch_line_of_the_8b_recipe_means_its_overrides() -> None:
    recipe = ROOT / "examples" / "llama3_8b_zero1.yml"
    words = read(str(recipe), "--deepspeed=deepspeed_configs/zero1.json", "--learning_rate", "1e-4")
    loaded = load(words[0], words[1:], check_files=False).recipe
    values = flat_values(loaded)
    assert values["deepspeed"] == "deepspeed_configs/zero1.json" and values["learning_rate"] == 1e-4


@pytest.mark.slow
def test_the_modules_that_a_launcher_starts_take_options(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(max_steps=1, adapter="lora")
    done = run_command("finetuner.train", "--learning-rate", "2e-3", recipe, "--output_dir", tmp_path / "there #1")
    assert done.code == 0, done.text
    saved = (tmp_path / "there #1" / "recipe.yml").read_text()
    assert "learning_rate: 0.002" in saved
    assert exit_of("merge", recipe, f"--output_dir={tmp_path / 'there #1'}", "--output", tmp_path / "m") == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"


# --- the values of overrides ---

VALUES: dict[str, tuple[str, Any]] = {
    "a number sign within a word": ("out#1", "out#1"),
    "a number sign behind a space": ("a #b", "a #b"),
    "a number sign alone": ("#b", "#b"),
    "equals": ("a=b", "a=b"),
    "double quotes": ('"a #b: c"', "a #b: c"),
    "single quotes": ("'a: b'", "a: b"),
    "home": ("~/out", "~/out"),
    "backslashes": ("C:\\out", "C:\\out"),
}


@pytest.mark.parametrize("text, value", VALUES.values(), ids=VALUES.keys())
def test_an_override_is_what_was_typed(write_recipe: RecipeWriter, text: str, value: Any) -> None:
    assert load(write_recipe(), [f"wandb_project={text}"]).recipe.tracking.wandb_project == value


@pytest.mark.parametrize("text", ["a: b", "@a", "%a", "[a", "*a", "!!python/name:os.system x", "[a] # b", "'a' b"])
def test_an_override_that_is_no_value_says_how_to_write_text(write_recipe: RecipeWriter, text: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(write_recipe(), [f"wandb_project={text}"])
    assert "To write it as text: wandb_project='\"...\"'" in str(error.value)
    assert "one line above" not in str(error.value)


def test_a_number_with_a_remark_is_no_number(write_recipe: RecipeWriter) -> None:
    with pytest.raises(RecipeError, match="max_steps is the text '5 #five', but must be"):
        load(write_recipe(), ["max_steps=5 #five"])


def test_lists_and_blocks_are_written_as_yaml(write_recipe: RecipeWriter) -> None:
    recipe = load(write_recipe(), ["eot_tokens=['<|im_end|>', \"#\"]", "special_tokens={pad_token: '#'}"]).recipe
    assert recipe.data.eot_tokens == ("<|im_end|>", "#") and recipe.tokenizer.special_tokens.pad_token == "#"


ELSEWHERE = {
    "lora_rank=4": ("adapter", "lora_r", 4),
    "per_device_train_batch_size=3": ("batch", "micro_batch_size", 3),
    "fsdp_config.fsdp_offload_params=true": ("sharding", "fsdp_config", None),
    "num_train_epochs=2": ("schedule", "num_epochs", 2),
}


@pytest.mark.parametrize("override", ELSEWHERE)
def test_other_tools_words_are_taken_or_answered_with_ours(write_recipe: RecipeWriter, override: str) -> None:
    section, key, value = ELSEWHERE[override]
    recipe = write_recipe(adapter="lora") if "fsdp" not in override else write_recipe(fsdp_version=2)
    try:
        loaded = load(recipe, [override]).recipe
    except RecipeError as error:
        assert key in str(error)  # our word for it
        return
    found = getattr(getattr(loaded, section), key)
    assert found == value or (value is None and found.offload_params is True)
