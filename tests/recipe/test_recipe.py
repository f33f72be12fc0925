"""The recipe: every mistake is named where it stands, nothing is guessed, and what is dumped loads again."""

import json
import random
import string
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from support.places import ROOT

from finetuner.errors import RecipeError
from finetuner.recipe import ALIASES, KEYS, SECTIONS, Recipe, dump_recipe, load, load_recipe
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.problems import near_words
from finetuner.recipe.rules import RULES, rule_findings
from finetuner.recipe.sections import TokenizerSection

BASE = "base_model: org/model\nlearning_rate: 2e-4\ndatasets:\n  - path: org/data\n    type: alpaca\n"
few = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | bytes], Path]:
    """write(text) -> a recipe of that text, in the same place each time."""
    path = tmp_path_factory.mktemp("recipes") / "r.yml"

    def write(text: str | bytes) -> Path:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture(scope="module")
def refusal(write: Callable[[str | bytes], Path]) -> Callable[..., str]:
    """refusal(text, *overrides) -> the message of the RecipeError, with the file called r.yml."""

    def refusal(text: str | bytes, *overrides: str) -> str:
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            load(path, overrides)
        return str(caught.value).replace(str(path), "r.yml")

    return refusal


# --- what the pages show ---

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [(page.name, i, text) for page in PAGES for i, text in enumerate(page.read_text().split("```yaml\n")[1:])]


@pytest.mark.parametrize(("name", "number", "text"), SHOWN, ids=[f"{name}-{i}" for name, i, _ in SHOWN])
def test_recipes_in_the_pages_are_recipes(write: Callable[..., Path], name: str, number: int, text: str) -> None:
    """Whole, or a part, to which a model, rows and a rate are added."""
    shown = text.split("```")[0]
    rest = {"base_model": "org/model", "learning_rate": "1e-4", "datasets": "[{path: org/data, type: alpaca}]"}
    keys = [line.split(":")[0] for line in shown.splitlines()]
    added = "".join(f"{key}: {value}\n" for key, value in rest.items() if key not in keys)
    recipe = load_recipe(write(shown + added), check_files=False)
    assert recipe.data.datasets[0].path in shown + added


# --- all mistakes at once ---

MANY_MISTAKES = """\
base_model: ./no/such/model
learning_rate: "2e-4"
micro_batch_size: 0
lr_sheduler: cosine
optimizer: adamw_torc
rl: dpo
datasets:
  - path: ./no.jsonl
    type: alpaca
    feild_messages: chat
  - path: org/data
    type: alpca
adapter: lora
lora_r: 1.5
warmup_steps: 3
warmup_ratio: 0.1
seed: 1
seed: 2
trust_remote_code: no
"""


def test_all_mistakes_come_in_one_message_with_their_places(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    optimizers = ", ".join(get_args(KEYS["optimizer"][1].annotation))
    assert refusal(MANY_MISTAKES).splitlines() == [
        "r.yml: 13 mistakes",
        "",
        f"r.yml:1:13: there is no model folder './no/such/model' (seen from {tmp_path}). Give a folder or a hub id.",
        "     1 | base_model: ./no/such/model",
        "       |             ^",
        "",
        "r.yml:2:16: learning_rate is the text '2e-4', but must be a number. Write 2e-4 without quotes.",
        '     2 | learning_rate: "2e-4"',
        "       |                ^",
        "",
        "r.yml:3:19: micro_batch_size is 0, but must be at least 1.",
        "     3 | micro_batch_size: 0",
        "       |                   ^",
        "",
        "r.yml:4:1: unknown key 'lr_sheduler'. Did you mean 'lr_scheduler'?",
        "     4 | lr_sheduler: cosine",
        "       | ^",
        "",
        "r.yml:5:12: optimizer is the text 'adamw_torc', but must be one of: "
        f"{optimizers}. Did you mean 'adamw_torch'?",
        "     5 | optimizer: adamw_torc",
        "       |            ^",
        "",
        "r.yml:6:1: 'rl' is not supported yet: preference and reinforcement learning. Remove it.",
        "     6 | rl: dpo",
        "       | ^",
        "",
        f"r.yml:8:11: there is no file './no.jsonl' (seen from {tmp_path}).",
        "     8 |   - path: ./no.jsonl",
        "       |           ^",
        "",
        "r.yml:10:5: unknown key 'datasets.0.feild_messages'. Did you mean 'field_messages'?",
        "    10 |     feild_messages: chat",
        "       |     ^",
        "",
        "r.yml:12:11: datasets.1.type is the text 'alpca', but must be one of: alpaca, completion, "
        "chat_template, input_output, prompt_completion, instruction_chat. "
        "Did you mean 'alpaca'?",
        "    12 |     type: alpca",
        "       |           ^",
        "",
        "r.yml:14:9: lora_r is 1.5, but must be a whole number.",
        "    14 | lora_r: 1.5",
        "       |         ^",
        "",
        "r.yml:16:15: warmup_steps and warmup_ratio are both given: both say how long the warmup is. Remove one.",
        "    15 | warmup_steps: 3",
        "    16 | warmup_ratio: 0.1",
        "       |               ^",
        "",
        "r.yml:18:1: 'seed' is given twice; line 17 has it already. Remove one.",
        "    18 | seed: 2",
        "       | ^",
        "",
        "r.yml:19:20: trust_remote_code is the text 'no', but must be true or false.",
        "    19 | trust_remote_code: no",
        "       |                    ^",
    ]


def test_files_that_are_named_must_exist(write_recipe: Callable[..., Path], tiny_model: Path) -> None:
    assert load_recipe(write_recipe()).model.base_model == str(tiny_model)
    wrong = write_recipe(
        base_model="~nobody-of-this-name/model",
        tokenizer="/" + "x" * 5000,
        datasets=[{"path": "./no.csv", "type": "alpaca"}],
        test_datasets=[{"path": "/no/such.parquet", "type": "alpaca"}],
        resume_from_checkpoint="/no/checkpoint",
    )
    with pytest.raises(RecipeError, match="5 mistakes") as caught:
        load(wrong)
    for name in ("model folder '~nobody", "model folder '/xxx", "file './no.csv'", "file '/no/such.parquet'"):
        assert f"there is no {name}" in str(caught.value)
    assert "there is no checkpoint folder '/no/checkpoint'" in str(caught.value)
    assert load(wrong, check_files=False)


def test_a_list_with_a_wrong_entry_is_not_called_empty(refusal: Callable[..., str]) -> None:
    message = refusal(BASE.replace("- path: org/data\n    type: alpaca", "-"))
    assert "1 mistake\n" in message
    assert "r.yml:4:4: datasets.0 is empty, but must be a block of `key: value` lines." in message


def test_thousands_of_mistakes_are_counted_and_not_all_shown(refusal: Callable[..., str]) -> None:
    message = refusal(BASE + f"tokens: [{'1, ' * 3000}]\n")
    assert "r.yml: 3,000 mistakes" in message
    assert "and 2,950 more" in message
    assert len(message) < 20_000


@pytest.mark.parametrize("field", ["learning_rate", "base_model", "datasets"])
def test_a_missing_key_is_named_with_its_meaning(refusal: Callable[..., str], field: str) -> None:
    lines = [line for line in BASE.splitlines() if not line.startswith(field)]
    text = "\n".join(line for line in lines if field != "datasets" or line[0] != " ")
    assert f"'{field}' is missing. {KEYS[field][1].description}" in refusal(text)


def _misspellings(key: str) -> set[str]:
    """Every word one slip away: a letter lost, two neighbors swapped, a letter wrong or one too many."""
    letters = string.ascii_lowercase + string.digits + "_"
    lost = {key[:i] + key[i + 1 :] for i in range(len(key))}
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    wrong = {key[:i] + letter + key[i + 1 :] for i in range(len(key)) for letter in letters}
    added = {key[:i] + letter + key[i:] for i in range(len(key) + 1) for letter in letters}
    return (lost | swapped | wrong | added) - {*KEYS, *MEANINGS, "plugins"}


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_misspelling_of_every_key_by_one_slip_is_corrected(refusal: Callable[..., str], key: str) -> None:
    slips = sorted(_misspellings(key))
    few = random.Random(key).sample(slips, 12)  # through a file; the rest, as the file's reader asks
    lines = refusal(BASE + "".join(f"{json.dumps(slip)}: 1\n" for slip in few)).splitlines()
    for slip in few:
        (line,) = (line for line in lines if f"unknown key '{slip}'." in line)
        assert f"'{key}'" in line.partition("Did you mean")[2], line
    for slip in slips[:: max(1, len(slips) // 60)]:
        assert key in near_words(slip, KEYS), slip


# --- YAML 1.2, strictly ---


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 2e-4", 2e-4),
        ("learning_rate: 1E-5", 1e-5),
        ("learning_rate: .5", 0.5),
        ("num_epochs: 3", 3.0),
        ("seed: 0x1F", 31),
        ("seed: 010", 10),
        ("bf16: False", False),
        ("output_dir: 2024-01-01", "2024-01-01"),
        ("output_dir: no", "no"),
        ("output_dir: '1e-3'", "1e-3"),
    ],
)
def test_plain_values_mean_what_yaml_1_2_says(write: Callable[[str], Path], line: str, value: object) -> None:
    key = line.partition(":")[0]
    rest = "".join(other for other in BASE.splitlines(keepends=True) if not other.startswith(key))
    recipe = load_recipe(write(rest + line))
    found = getattr(getattr(recipe, KEYS[key][0]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((f"fp16: {word}", f"fp16 is the text '{word}', but must be true or false.") for word in ("no", "yes", "off")),
        ("fp16: 1", "fp16 is 1, but must be true or false."),
        ("seed: true", "seed is true, but must be a whole number."),
        ("seed: 3.0", "seed is 3.0, but must be a whole number."),
        ('seed: "3"', "seed is the text '3', but must be a whole number. Write 3 without quotes."),
        ('seed: "3.5"', "seed is the text '3.5', but must be a whole number."),
        ("num_epochs: nan", "num_epochs is the text 'nan', but must be a number."),
        ("num_epochs: .nan", "num_epochs is nan, but must be a finite number."),
        ("num_epochs: 1e999", "num_epochs is inf, but must be a finite number."),
        ("num_epochs: -1", "num_epochs is -1, but must be more than 0.0."),
        ("warmup_ratio: 1.5", "warmup_ratio is 1.5, but must be at most 1.0."),
        ("adam_beta1: 1.0", "adam_beta1 is 1.0, but must be less than 1.0."),
        ("bf16: maybe", "bf16 is the text 'maybe', but must be auto or true or false."),
        ("resume_from_checkpoint: 3", "resume_from_checkpoint is 3, but must be true or false or text."),
        ("output_dir: 3", "output_dir is 3, but must be text."),
        ("output_dir: ''", "output_dir is empty. Folder for all that the run writes."),
        ("tokens: a", "tokens is the text 'a', but must be a list (lines that begin with `- `)."),
        ("tokens: [a, null]", "tokens.1 is empty, but must be text."),
        ("special_tokens: [a]", "special_tokens is a list, but must be a block of `key: value` lines."),
        ("special_tokens: {pad_tokn: a}", "unknown key 'special_tokens.pad_tokn'. Did you mean 'pad_token'?"),
        ("seed: " + "9" * 5000, "is not of the kind 'int'"),
        ("seed: 0x" + "f" * 5000, "a whole number is at most 9223372036854775807 here."),
        ("seed: !!int abc", "'abc' is not of the kind 'int'; write the value plainly."),
        ("seed: !!bool maybe", "'maybe' is not of the kind 'bool'; write the value plainly."),
        ("seed: !!python/object:os.system [a]", "python/object:os.system is not supported; write the value plainly."),
        ("tokens: !!set {a}", "the tag tag:yaml.org,2002:set is not supported; write the value plainly."),
        ("a: &x 1\nb: &x 2", "the anchor '&x' is given twice. Rename one."),
        ("1: 2", "unknown key '1'."),
        ("? [a, b]\n: 2", "unknown key '?'."),
        ("<<: {seed: 1}", "unknown key '<<'."),
    ],
)
def test_a_wrong_value_is_one_mistake(refusal: Callable[..., str], line: str, message: str) -> None:
    text = refusal(BASE + line)
    assert "r.yml: 1 mistake\n" in text
    assert message in text
    # learning_rate and all else that is right stays unmentioned
    assert text.splitlines()[2].startswith(("r.yml:6:", "r.yml:7:"))


# --- what is no recipe at all ---

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
NOT_RECIPES: dict[str, tuple[str | bytes, str]] = {
    "tabs": ("base_model: a\ndatasets:\n\t- path: a\n", "r.yml:3:1: not valid YAML"),
    "indentation": ("base_model: a\n  learning_rate: 1\n", "r.yml:2:16: not valid YAML"),
    "open quote": ('base_model: "a\nlearning_rate: 1\n', "not valid YAML"),
    "list": ("- base_model: a\n", "r.yml:1:1: a recipe is a list of `key: value` lines; this is not one."),
    "one word": ("hello", "r.yml:1:1: a recipe is a list of `key: value` lines; this is not one."),
    "empty": ("", "3 mistakes"),
    "comments only": ("# nothing\n", "3 mistakes"),
    "two documents": (BASE + "---\nseed: 1\n", "r.yml:6:1: not valid YAML"),
    "random bytes": (bytes(range(256)), "cannot be read as UTF-8 text"),
    "control characters": ("base_model: \0", "r.yml is not YAML text"),
    "no such character": ('base_model: "\\UFFFFFFFF"', "r.yml is not YAML text"),
    "undefined alias": ("base_model: *a", "r.yml:1:13: not valid YAML"),
    "billion laughs": (LAUGHS, "this has more"),
    "alias to itself": ("datasets: &a [*a]\n", "this has more"),
    "mapping in itself": ("datasets: &a\n  b: *a\n", "this has more"),
    "5,000 brackets": ("datasets: " + "[" * 5000 + "]" * 5000, "r.yml:1:50: a recipe nests at most 40 blocks"),
    "100,000 open brackets": ("datasets: " + "[" * 100_000, "a recipe nests at most 40 blocks"),
    "600 blocks": ("".join(" " * i + "a:\n" for i in range(600)), "a recipe nests at most 40 blocks"),
    "30,000 entries": ("tokens: [" + "a," * 30_000 + "]", "at most 20,000 values"),
    "2 MB": (BASE + "# " + "x" * 2_000_000, "has 2,000,090 bytes; a recipe may have 300,000. Is it a recipe?"),
}


@pytest.mark.parametrize("name", NOT_RECIPES)
def test_what_is_no_recipe_is_refused_within_two_seconds(refusal: Callable[..., str], name: str) -> None:
    text, message = NOT_RECIPES[name]
    started = time.process_time()
    assert message in refusal(text)
    assert time.process_time() - started < 2


def test_a_tab_is_named_as_one(refusal: Callable[..., str]) -> None:
    assert "Indent with spaces, not tabs." in refusal(NOT_RECIPES["tabs"][0])


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(BASE)
    for path, message in (
        (tmp_path, "is a folder; name the recipe's YAML file in it"),
        (tmp_path / "recip.yml", "Did you mean 'recipe.yml'?"),
        (tmp_path / "no" / "recipe.yml", "there is no recipe"),
        (tmp_path / ("x" * 5000), "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
            load(path)


yaml_like = st.text(alphabet=st.sampled_from("abe01.:-,[]{}&*!|>'\"#%@?~\\ \n\t\r\u2028é"), max_size=60)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("alpaca")
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "type", "pad_token", "x", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)


@few
@given(text=yaml_like | st.text(max_size=60) | yaml_like.map(lambda text: BASE + "tokens: " + text))
def test_random_text_is_loaded_or_refused(write: Callable[..., Path], text: str) -> None:
    _loads_or_is_refused(write(text.encode(errors="ignore")))


@few
@given(values=st.dictionaries(st.sampled_from([*KEYS, *ALIASES, "no_such_key", ""]), nested, max_size=5))
def test_random_structures_are_loaded_or_refused(write: Callable[..., Path], values: dict[str, Any]) -> None:
    _loads_or_is_refused(write(json.dumps(values)))


@few
@given(
    override=st.text(max_size=20) | st.builds("{}={}".format, st.text("datasets.0195pathx²-", max_size=14), yaml_like)
)
def test_random_overrides_are_taken_or_refused(write: Callable[..., Path], override: str) -> None:
    _loads_or_is_refused(write(BASE), override)


def _loads_or_is_refused(path: Path, *overrides: str) -> None:
    try:
        load(path, overrides)
    except RecipeError as error:
        assert 0 < len(str(error)) < 50_000


# --- overrides and aliases ---


@pytest.mark.parametrize(
    ("overrides", "reads", "value"),
    [
        (["learning_rate=1e-5"], lambda r: r.schedule.learning_rate, 1e-5),
        (["learning_rate=1e-5", "learning_rate=1e-6"], lambda r: r.schedule.learning_rate, 1e-6),
        (["output_dir=a=b"], lambda r: r.output.output_dir, "a=b"),
        (["output_dir='no'"], lambda r: r.output.output_dir, "no"),
        (["seed="], lambda r: r.output.seed, 42),
        (["seed=7", "seed=null"], lambda r: r.output.seed, 42),
        (["special_tokens.pad_token=<pad>"], lambda r: r.tokenizer.special_tokens.pad_token, "<pad>"),
        (["special_tokens={pad_token: <pad>}"], lambda r: r.tokenizer.special_tokens.pad_token, "<pad>"),
        (["datasets.0.path=org/other"], lambda r: r.data.datasets[0].path, "org/other"),
        (["tokens.0=<a>", "tokens.1=<b>"], lambda r: r.tokenizer.tokens, ("<a>", "<b>")),
        (["tokens=[<a>, <b>]", "tokens.1=<c>"], lambda r: r.tokenizer.tokens, ("<a>", "<c>")),
        (["tokens=\n- <a>\n- <b>"], lambda r: r.tokenizer.tokens, ("<a>", "<b>")),
        (
            ["datasets.1={path: org/b, type: alpaca}"],
            lambda r: [e.path for e in r.data.datasets],
            ["org/data", "org/b"],
        ),
        (["max_seq_length=77"], lambda r: r.data.sequence_len, 77),
    ],
)
def test_an_override_is_as_if_written_in_the_file(
    write: Callable[..., Path], overrides: list[str], reads: Callable[[Recipe], Any], value: object
) -> None:
    assert reads(load_recipe(write(BASE), overrides)) == value


def test_an_override_replaces_the_key_whichever_of_its_names_the_file_has(
    write: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    for name in ("sequence_length", "sequence_len", "max_seq_length"):
        for other in ("sequence_length=128", "sequence_len=128"):
            assert load_recipe(write(BASE + f"{name}: 512\n"), [other]).data.sequence_len == 128
    assert "are the same key" in refusal(BASE + "sequence_len: 512\nsequence_length: 512\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "an override is written key=value, such as learning_rate=1e-4."),
        ("=3", "an override is written key=value"),
        ("seed=[1", "the value is not YAML"),
        ("seed=a: b", "the value is not YAML"),
        ("seed=\nvalue: 3\nseed: 4", "seed is a block of keys, but must be a whole number."),
        ("seed=abc", "seed is the text 'abc', but must be a whole number."),
        ("seeed=3", "unknown key 'seeed'. Did you mean 'seed'?"),
        ("special_tokens.pad_tokn.x=3", "unknown key 'special_tokens.pad_tokn'. Did you mean 'pad_token'?"),
        ("learning_rate.x=3", "the recipe has no place 'learning_rate.x' to write to."),
        ("datasets.2.path=a", "the recipe has no place 'datasets.2.path' to write to."),
        ("datasets.-1.path=a", "the recipe has no place 'datasets.-1.path' to write to."),
        ("datasets.first.path=a", "the recipe has no place 'datasets.first.path' to write to."),
        ("datasets.².path=a", "the recipe has no place 'datasets.².path' to write to."),
        ("datasets.0.tpye=a", "unknown key 'datasets.0.tpye'. Did you mean 'type'?"),
        ("datasets=null", "'datasets' is missing."),
        ("0=3", "the recipe has no place '0' to write to."),
        ("lora_target_modules.3=q_proj", "It has no list 'lora_target_modules': write it whole"),
    ],
)
def test_a_wrong_override_is_reported_as_the_override(refusal: Callable[..., str], override: str, message: str) -> None:
    text = refusal(BASE, "num_epochs=2", override)
    assert "r.yml: 1 mistake\n\n<override 2>: " in text
    assert message in text
    assert f"\n         {override.splitlines()[0]}" in text


def test_an_override_takes_the_place_of_what_stood_below_it(refusal: Callable[..., str]) -> None:
    wrong = BASE.replace("type: alpaca", "type: alpca")
    assert "r.yml:5:11: datasets.0.type" in refusal(wrong)
    assert "<override 1>: datasets.0.type" in refusal(wrong, "datasets=[{path: a/b, type: alpca}]")
    assert "<override 1>: datasets.0.type" in refusal(wrong, "datasets.0.type=alpaka")


def test_mistakes_in_file_and_overrides_come_together(refusal: Callable[..., str]) -> None:
    text = refusal(BASE + "seed: -1\n", "tokens.5=a", "bf16", "logging_steps=0")
    assert "4 mistakes" in text
    for where in ("<override 1>: ", "<override 2>: ", "<override 3>: ", "r.yml:6:7: seed is -1"):
        assert where in text


def test_a_key_without_a_value_means_its_default(write: Callable[..., Path]) -> None:
    optional = [key for key in KEYS if key not in ("base_model", "datasets", "learning_rate")]
    recipe = load_recipe(write(BASE + "".join(f"{key}:\n" for key in optional)))
    assert recipe == load_recipe(write(BASE))


@pytest.mark.parametrize(("alias", "key"), [item for item in ALIASES.items() if item[1] in KEYS])
def test_an_alias_is_read_with_a_note_and_never_beside_its_key(
    write: Callable[..., Path], refusal: Callable[..., str], alias: str, key: str
) -> None:
    value = json.dumps(ALIAS_VALUES.get(key, "text"))
    loaded = load(write(f"{BASE}{alias}: {value}\n"))
    assert [str(note) for note in loaded.notes] == [f"line 6: {alias} is read as {key}"]
    assert loaded.recipe == load_recipe(write(f"{BASE}{key}: {value}\n"))
    message = refusal(f"{BASE}{alias}: {value}\n{key}: {value}\n")
    assert f"r.yml:6:1: '{alias}' and '{key}' are the same key. Remove one." in message
    assert f"r.yml:6:{len(alias) + 3}: {key} is" in refusal(f"{BASE}{alias}: [[0]]\n")


ALIAS_VALUES = {
    "sequence_len": 512, "eval_strategy": "epoch", "neftune_noise_alpha": 5.0, "overrides_of_model_config": {},
    "gradient_checkpointing": True, "adam_epsilon": 1e-6, "bnb_config_kwargs": {}, "cosine_min_lr": 1e-5,
}  # fmt: skip


# --- the Recipe ---


def test_sections_are_frozen_and_nested(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write(BASE + "adapter: lora\nlora_r: 8\n"))
    assert (recipe.adapter.lora_r, recipe.adapter.lora_alpha, recipe.data.datasets[0].type) == (8, 32, "alpaca")
    for thing, name in ((recipe, "adapter"), (recipe.adapter, "lora_r"), (recipe.data.datasets[0], "path")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, getattr(thing, name))


TEXTS = [
    "no",
    "1e-3",
    "null",
    "~",
    " x",
    "x ",
    "",
    "a: b",
    "# c",
    "- d",
    "é🦊",
    "'",
    '"',
    "\n",
    "2024-01-01",
    "<|a|>",
    "0x1",
]
texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=120)


def _bound(metadata: list[Any], name: str, default: Any) -> Any:
    """The bound `name` ("ge", "min_length") among a field's annotations, which may be fields themselves."""
    flat = [inner for entry in metadata for inner in getattr(entry, "metadata", [entry])]
    return next((getattr(entry, name) for entry in flat if hasattr(entry, name)), default)


def _strategy(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a field, from its type and bounds."""
    if hasattr(annotation, "__metadata__"):
        return _strategy(annotation.__origin__, list(annotation.__metadata__))
    least = _bound(metadata, "min_length", 0)
    if get_origin(annotation) in (Union, types.UnionType):  # None is how a key is left out
        lengths = [entry for entry in metadata if hasattr(entry, "min_length")]
        return st.one_of(*(_strategy(a, lengths) for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        return st.lists(_strategy(get_args(annotation)[0], []), min_size=least, max_size=3)
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        if value is Any:
            return st.just({"zero_optimization": {"stage": 2}})
        return st.dictionaries(texts, _strategy(value, []), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _fields(annotation)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(_bound(metadata, "ge", 0), 2**40)
    if annotation is float:
        above, below = _bound(metadata, "gt", None), _bound(metadata, "lt", None)
        low = above if above is not None else _bound(metadata, "ge", 0.0)
        high = below if below is not None else _bound(metadata, "le", 1e30)
        odd = st.sampled_from([1e-05, 1e-8, 0.1, 5e-324, 0.3333333333333333])
        return odd | st.floats(low, high, exclude_min=above is not None, exclude_max=below is not None)
    assert annotation in (str, Any), annotation
    return texts.filter(lambda text: len(text) >= least)


def _fields(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    needed = {n: _strategy(f.annotation, f.metadata) for n, f in model.model_fields.items() if f.is_required()}
    optional = {n: _strategy(f.annotation, f.metadata) for n, f in model.model_fields.items() if not f.is_required()}
    return st.fixed_dictionaries(needed, optional=optional)


def _recipe_of(given_keys: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe of these keys, less those that a rule asks to change."""
    while True:
        sections = {name: SECTIONS[name].model_validate(keys) for name, keys in given_keys.items()}
        values = {key: getattr(sections[name], key) for key, (name, _) in KEYS.items()}
        wrong = {str(path[0]) for path, *_ in rule_findings(values)}
        if not wrong:
            return Recipe.model_validate(sections)
        if wrong & {"datasets", "test_datasets"}:  # the rule speaks of some key of one entry
            for entry in [*given_keys["data"].get("datasets", []), *given_keys["data"].get("test_datasets", [])]:
                for key in entry.keys() - {"path"}:
                    del entry[key]
        for name, keys in given_keys.items():
            given_keys[name] = {k: v for k, v in keys.items() if k not in wrong - {"datasets", "test_datasets"}}
        if "adapter" in wrong:
            _drop_adapter(given_keys)


def _drop_adapter(keys: dict[str, dict[str, Any]]) -> None:
    """Without an adapter, keys that speak of one are refused."""
    keys["adapter"] = {}
    keys["rates"] = {key: value for key, value in keys.get("rates", {}).items() if not key.startswith("loraplus_")}


# Shrinking takes minutes with this many keys, and an example is readable without.
@settings(deadline=None, max_examples=80, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(keys=st.fixed_dictionaries({name: _fields(section) for name, section in SECTIONS.items()}))
def test_a_dumped_recipe_loads_equal(write: Callable[..., Path], keys: dict[str, dict[str, Any]]) -> None:
    if keys["adapter"].get("adapter") is None:
        _drop_adapter(keys)
        keys["rates"].pop("loraplus_lr_ratio", None)
    recipe = _recipe_of(keys)
    dumped = dump_recipe(recipe, "as it ran")
    assert load_recipe(write(dumped), check_files=False) == recipe
    assert dumped.startswith("# as it ran\n")


@pytest.mark.parametrize(
    "text", ["x" * 78 + "  two spaces", "a  b" * 40, "\x85", "a\u2028b", "\x1f 🦊" * 40, "\n \n" * 40]
)
def test_long_and_odd_texts_are_dumped_as_they_are(write: Callable[..., Path], text: str) -> None:
    recipe = load_recipe(write(BASE))
    changed = recipe.model_copy(update={"tokenizer": TokenizerSection(tokens=(text, "b"))})
    assert load_recipe(write(dump_recipe(changed, "x"))) == changed


def test_a_dump_writes_every_default(write: Callable[..., Path]) -> None:
    dumped = dump_recipe(load_recipe(write(BASE + "adapter: lora\n")), "x")
    unset = {key for key, (_, info) in KEYS.items() if info.default is None or info.default == {}}
    unset |= {"special_tokens", "bnb_config_kwargs"}
    unset.remove("adapter")
    assert {line.partition(":")[0] for line in dumped.splitlines() if line[0].isalpha()} == set(KEYS) - unset


# --- rules across keys ---

# (name of the key at fault, what is wrong, what is right)
CHAT = {"path": "a/b", "type": "chat_template"}
COMPLETION = {"path": "a/b", "type": "completion"}
SCRATCH = {"base_model": "from-scratch", "model": {"preset": "gpt-nano"}, "tokenizer": "byte", "sequence_len": 256}
RULE_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "rampup_batch_size",
        {"rampup_batch_size": {"start": 1, "steps": 2}, "group_by_length": True},
        {"rampup_batch_size": {"start": 1, "steps": 2}},
    ),
    (
        "steps",
        {"rampup_batch_size": {"start": 1, "steps": 9}, "max_steps": 8},
        {"rampup_batch_size": {"start": 1, "steps": 8}, "max_steps": 8},
    ),
    ("warmup_ratio", {"warmup_steps": 5, "warmup_ratio": 0.1}, {"warmup_steps": 5}),
    (
        "label_smoothing_factor",
        {"loss_weighting": "probability", "label_smoothing_factor": 0.1},
        {"loss_weighting": "probability"},
    ),
    (
        "evals_per_epoch",
        {"val_set_size": 1, "eval_steps": 5, "evals_per_epoch": 2},
        {"val_set_size": 1, "eval_steps": 5},
    ),
    (
        "fsdp",
        {"fsdp": ["full_shard"], "deepspeed": {"zero_optimization": {"stage": 1}}},
        {"deepspeed": {"zero_optimization": {"stage": 1}}},
    ),
    ("fsdp", {"fsdp": ["full_shard", "no_shard"]}, {"fsdp": ["full_shard"]}),
    ("fsdp", {"fsdp": ["no_shard", "offload"]}, {"fsdp": ["full_shard", "offload"]}),
    (
        "fsdp_config",
        {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
        {"fsdp": ["full_shard"], "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
    ),
    (
        "fsdp_config",
        {"fsdp_config": {"cpu_ram_efficient_loading": True, "sync_module_states": False}},
        {"fsdp_config": {"cpu_ram_efficient_loading": True, "sync_module_states": True}},
    ),
    ("fsdp_version", {"fsdp_version": 2}, {"fsdp_version": 2, "fsdp": ["full_shard"]}),
    ("dp_shard_size", {"dp_shard_size": 2}, {"dp_shard_size": 2, "fsdp": ["full_shard"]}),
    ("optimizer", {"optimizer": "adamw_bnb_8bit", "fsdp": ["full_shard"]}, {"fsdp": ["full_shard"]}),
    ("momentun", {"optimizer": "sgd", "optim_args": {"momentun": 0.9}}, {"optimizer": "sgd"}),
    ("adam_beta1", {"optimizer": "sgd", "adam_beta1": 0.8}, {"optimizer": "sgd"}),
    ("powr", {"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"powr": 2}}, {"lr_scheduler": "polynomial"}),
    (
        "lr_scheduler",
        {"lr_scheduler": "warmup_stable_decay"},
        {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
    ),
    ("hub_private_repo", {"hub_private_repo": False}, {"hub_private_repo": False, "hub_model_id": "me/x"}),
    (
        "torch_compile_backend",
        {"torch_compile_backend": "eager"},
        {"torch_compile_backend": "eager", "torch_compile": True},
    ),
    ("logging_dir", {"logging_dir": "x"}, {"logging_dir": "x", "use_tensorboard": True}),
    (
        "trackio_run_name",
        {"trackio_run_name": "x"},
        {"trackio_run_name": "x", "trackio_project_name": "y"},
    ),
    ("embedding_lr_scale", {"embedding_lr": 1e-5, "embedding_lr_scale": 2.0}, {"embedding_lr": 1e-5}),
    ("saves_per_epoch", {"save_steps": 5, "saves_per_epoch": 2}, {"saves_per_epoch": 2}),
    ("load_in_4bit", {"adapter": "qlora", "load_in_4bit": False}, {"adapter": "qlora"}),
    ("bnb_config_kwargs", {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, {"adapter": "qlora"}),
    ("quantized_cache", {"adapter": "lora", "quantized_cache": True}, {"adapter": "qlora", "quantized_cache": True}),
    ("peft_use_dora", {"adapter": "qlora", "peft_use_dora": True}, {"adapter": "lora", "peft_use_dora": True}),
    ("load_in_8bit", {"load_in_8bit": True}, {"load_in_8bit": True, "adapter": "lora"}),
    ("fp16", {"bf16": True, "fp16": True}, {"bf16": False, "fp16": True}),
    ("lora_target_linear", {"lora_target_linear": True}, {"lora_target_linear": True, "adapter": "lora"}),
    (
        "lora_target_modules",
        {"adapter": "lora", "lora_target_linear": True, "lora_target_modules": ["q_proj", "lm_head"]},
        {"adapter": "lora", "lora_target_linear": True, "lora_target_modules": ["q_proj"]},
    ),
    ("lora_r", {"lora_r": 16}, {"lora_r": 16, "adapter": "lora"}),
    (
        "name",
        {"datasets": [{"path": "x.csv", "type": "alpaca", "name": "main"}]},
        {"datasets": [{"path": "org/x", "type": "alpaca", "name": "main"}]},
    ),
    ("lora_target_modules", {"lora_target_modules": ["q"]}, {"lora_target_modules": ["q"], "adapter": "lora"}),
    ("lora_target_modules", {"adapter": "lora", "lora_target_modules": []}, {"adapter": "lora"}),
    ("val_set_size", {"val_set_size": 2.5}, {"val_set_size": 2.0}),
    (
        "val_set_size",
        {"val_set_size": 0.1, "test_datasets": [{"path": "a/b", "type": "alpaca"}]},
        {"val_set_size": 0.1},
    ),
    (
        "cosine_min_lr_ratio",
        {"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"},
        {"cosine_min_lr_ratio": 0.1, "lr_scheduler": "cosine"},
    ),
    (
        "dtype",
        {"overrides_of_model_config": {"dtype": "bfloat16"}},
        {"overrides_of_model_config": {"rope_theta": 1e6}},
    ),
    (
        "activation_offloading",
        {"activation_offloading": True},
        {"activation_offloading": True, "gradient_checkpointing": True},
    ),
    ("resize_token_embeddings_to_32x", SCRATCH | {"resize_token_embeddings_to_32x": True}, SCRATCH),
    ("cosine_min_lr", {"cosine_min_lr": 2.0, "learning_rate": 1.0}, {"cosine_min_lr": 0.5, "learning_rate": 1.0}),
    ("lr_quadratic_warmup", {"lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.1}, {"lr_quadratic_warmup": True}),
    (
        "field_messages",
        {"datasets": [{"path": "a/b", "type": "alpaca", "field_messages": "chat"}]},
        {"datasets": [{"path": "a/b", "type": "chat_template", "field_messages": "chat"}]},
    ),
    ("field", {"datasets": [{"path": "a/b", "field": "t"}]}, {"datasets": [COMPLETION | {"field": "t"}]}),
    (
        "weight",
        {"test_datasets": [COMPLETION | {"weight": 2.0}]},
        {"datasets": [COMPLETION | {"weight": 2.0}]},
    ),
    (
        "weight",
        {"datasets": [COMPLETION | {"weight": 2.0}, COMPLETION]},
        {"datasets": [COMPLETION | {"weight": 2.0}, COMPLETION | {"weight": 1.0}]},
    ),
    ("mix_by", {"mix_by": "tokens"}, {"mix_by": "tokens", "datasets": [COMPLETION | {"weight": 2.0}]}),
    ("streaming", {"streaming": True}, {"streaming": True, "max_steps": 5}),
    (
        "max_tokens",
        {"streaming": True, "max_tokens": "1M"},
        {"streaming": True, "max_tokens": "1M", "datasets": [COMPLETION]},
    ),
    ("generate_samples", {"generate_samples": 5, "fsdp": ["full_shard"]}, {"generate_samples": 5}),
    ("generate_prompt", {"generate_prompt": "a"}, {"generate_prompt": "a", "generate_samples": 5}),
    ("max_tokens", {"max_steps": 5, "max_tokens": "1M"}, {"max_tokens": "1M"}),
    (
        "sample_by",
        {"datasets": [COMPLETION | {"sample_by": "document"}]},
        {"datasets": [COMPLETION | {"sample_by": "document", "ds_type": "text"}]},
    ),
    ("base_model", {"base_model": "from-scratch", "tokenizer": "byte"}, SCRATCH),
    (
        "chat_template",
        {"tokenizer_use_mistral_common": True, "chat_template": "chatml"},
        {"tokenizer_use_mistral_common": True, "chat_template": "tokenizer_default"},
    ),
    ("model", SCRATCH | {"model": {"layers": 2}}, SCRATCH),
    ("model", SCRATCH | {"model": {"preset": "gpt-nano", "heads": 3}}, SCRATCH),
    ("model", SCRATCH | {"model": {"preset": "gpt-nano", "key_value_heads": 3}}, SCRATCH),
    ("model", SCRATCH | {"model": {"preset": "gpt-nano", "width": 132, "heads": 4}}, SCRATCH),
    ("sequence_len", SCRATCH | {"sequence_len": 2048}, SCRATCH),
    ("adapter", SCRATCH | {"adapter": "lora"}, SCRATCH),
    ("tokenizer", {"tokenizer": "char"}, {"tokenizer": "a/b"}),
    ("tokenizer", SCRATCH | {"tokenizer": "char"}, SCRATCH | {"tokenizer": "char", "datasets": [COMPLETION]}),
    (
        "val_set_size",
        {"streaming": True, "max_steps": 5, "val_set_size": 0.1},
        {"streaming": True, "max_steps": 5, "test_datasets": [COMPLETION]},
    ),
    (
        "saves_per_epoch",
        {"streaming": True, "max_steps": 5, "saves_per_epoch": 2},
        {"streaming": True, "max_steps": 5, "save_steps": 2},
    ),
    (
        "split",
        {"streaming": True, "max_steps": 5, "datasets": [COMPLETION | {"split": "train[:5]"}]},
        {"streaming": True, "max_steps": 5, "datasets": [COMPLETION | {"split": "train_sft"}]},
    ),
    (
        "max_samples",
        {"streaming": True, "max_steps": 5, "datasets": [COMPLETION | {"max_samples": 5}]},
        {"max_steps": 5, "datasets": [COMPLETION | {"max_samples": 5}]},
    ),
    (
        "streaming_multipack_buffer_size",
        {"streaming_multipack_buffer_size": 5},
        {"streaming_multipack_buffer_size": 5, "streaming": True, "max_steps": 5},
    ),
    (
        "field_instruction",
        {"datasets": [{"path": "a/b", "type": {"field_instruction": "text", "field_output": "text"}}]},
        {"datasets": [{"path": "a/b", "type": {"field_instruction": "input", "field_output": "text"}}]},
    ),
    (
        "unused_columns",
        {"datasets": [CHAT | {"unused_columns": ["messages"]}]},
        {"datasets": [CHAT | {"unused_columns": ["persona"]}]},
    ),
    (
        "roles",
        {"datasets": [CHAT | {"roles": {"user": ["x"], "assistant": ["x"]}}]},
        {"datasets": [CHAT | {"roles": {"user": ["x"], "assistant": ["y"]}}]},
    ),
    ("shards_idx", {"datasets": [CHAT | {"shards_idx": 1}]}, {"datasets": [CHAT | {"shards_idx": 1, "shards": 2}]}),
    (
        "format",
        {"datasets": [{"path": "a/b", "type": {"format": "{input}{instuction}"}}]},
        {"datasets": [{"path": "a/b", "type": {"format": "{input}{instruction}"}}]},
    ),
    (
        "no_input_format",
        {"datasets": [{"path": "a/b", "type": {"no_input_format": "Say it: "}}]},
        {"datasets": [{"path": "a/b", "type": {"no_input_format": "Say it: {instruction}"}}]},
    ),
    (
        "chat_template",
        {"datasets": [CHAT | {"chat_template": "chatml"}, CHAT | {"chat_template": "llama3"}]},
        {"datasets": [CHAT | {"chat_template": "llama3"}, CHAT | {"chat_template": "llama3"}]},
    ),
    ("chat_template", {"chat_template": "jinja"}, {"chat_template": "jinja", "chat_template_jinja": "t.jinja"}),
    ("chat_template", {"chat_template": "chatlm"}, {"chat_template": "tokenizer_default_fallback_chatml"}),
    (
        "chat_template_jinja",
        {"chat_template": "chatml", "chat_template_jinja": "t.jinja"},
        {"chat_template_jinja": "t.jinja"},
    ),
    (
        "pretrain_multipack_attn",
        {"sample_packing": True, "pretrain_multipack_attn": False},
        {
            "sample_packing": True,
            "pretrain_multipack_attn": False,
            "datasets": [{"path": "org/data", "type": "completion"}],
        },
    ),
    ("group_by_length", {"sample_packing": True, "group_by_length": True}, {"group_by_length": True}),
    (
        "overwrite_output_dir",
        {"overwrite_output_dir": True, "resume_from_checkpoint": True},
        {"overwrite_output_dir": True},
    ),
    (
        "peft_layers_to_transform",
        {"adapter": "lora", "peft_layers_to_transform": []},
        {"adapter": "lora", "peft_layers_to_transform": [0]},
    ),
    (
        "lora_target_modules",
        {"adapter": "lora", "lora_target_modules": "q_proj)"},
        {"adapter": "lora", "lora_target_modules": ".*q_proj"},
    ),
    (
        "unfrozen_parameters",
        {"adapter": "lora", "unfrozen_parameters": ["lm_head"]},
        {"unfrozen_parameters": ["lm_head"]},
    ),
    ("eval_strategy", {"val_set_size": 1, "eval_strategy": "steps"}, {"eval_strategy": "no"}),
    ("saves_per_epoch", {"save_strategy": "epoch", "saves_per_epoch": 2}, {"save_strategy": "epoch"}),
    ("early_stopping_patience", {"early_stopping_patience": 2}, {"early_stopping_patience": 2, "val_set_size": 1}),
    (
        "save_strategy",
        {"val_set_size": 1, "load_best_model_at_end": True, "save_strategy": "no"},
        {"val_set_size": 1, "load_best_model_at_end": True, "save_strategy": "best"},
    ),
    ("save_only_model", {"save_only_model": True, "resume_from_checkpoint": True}, {"save_only_model": True}),
    (
        "loss_watchdog_patience",
        {"loss_watchdog_patience": 2},
        {"loss_watchdog_patience": 2, "loss_watchdog_threshold": 5.0},
    ),
]
NEEDED = {"base_model": "org/model", "learning_rate": 1e-3, "datasets": [{"path": "org/data", "type": "alpaca"}]}


@pytest.mark.parametrize(("key", "wrong", "right"), RULE_CASES)
def test_keys_that_exclude_each_other_are_refused_and_mended(
    write: Callable[..., Path],
    refusal: Callable[..., str],
    key: str,
    wrong: dict[str, Any],
    right: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "x.csv").write_text("a file that is there")
    monkeypatch.chdir(tmp_path)

    def text(keys: dict[str, Any]) -> str:
        return "".join(f"{k}: {json.dumps(v)}\n" for k, v in (NEEDED | keys).items())

    message = refusal(text(wrong))
    assert "r.yml: 1 mistake\n" in message
    lines = message.splitlines()
    caret = next(line for line in lines if line.endswith("^"))
    shown = lines[lines.index(caret) - 1]
    assert shown[: caret.index("^")].rstrip(' "').rstrip(":").rstrip('"').endswith(key)
    assert load_recipe(write(text(right)))


def test_every_rule_has_a_case() -> None:
    for keys, rule in RULES:
        found = []
        for _, wrong, _ in RULE_CASES:
            sections = [s.model_validate({k: v for k, v in (NEEDED | wrong).items() if k in s.model_fields})
                        for s in SECTIONS.values()]  # fmt: skip
            found += list(rule({k: getattr(s, k) for s in sections for k in type(s).model_fields}))
        assert found, f"no case for the rule {rule.__name__} about {keys}"


# --- speed ---


def test_checking_a_recipe_imports_nothing_heavy(write: Callable[..., Path]) -> None:
    path = write(BASE)
    script = f"""
import sys
def heavy(): return [m for m in ("torch", "transformers", "datasets", "accelerate", "peft") if m in sys.modules]
import finetuner.recipe
assert not heavy(), heavy()
from finetuner.cli import main
try:
    main(["check", {str(path)!r}])
except SystemExit as done:
    assert done.code == 0, done.code
assert not heavy(), heavy()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}: no mistakes\n"


def test_a_misspelled_required_key_is_one_mistake(refusal: Callable[..., str]) -> None:
    message = refusal(BASE.replace("learning_rate", "learning_rat"))
    assert "1 mistake\n" in message and "Did you mean 'learning_rate'?" in message


# --- secrets ---


def test_a_secret_in_a_recipe_is_refused_and_not_repeated(refusal: Callable[..., str]) -> None:
    for text in ("hub_token: hf_abc123\n", "wandb_api_key: 'hf_abc123'\n"):
        message = refusal(BASE + text)
        assert "secrets in a recipe" in message
        assert "hf_abc123" not in message
    assert "hf_abc123" not in refusal(BASE, "hub_token=hf_abc123")


def test_credentials_in_an_address_are_not_saved(write: Callable[..., Path]) -> None:
    text = BASE.replace("org/data", "https://me:pw123@host/rows.jsonl?sig=abc&v=1")
    dumped = dump_recipe(load_recipe(write(text), check_files=False), "a copy")
    assert "pw123" not in dumped
    assert "abc" not in dumped
    assert "https://***@host/rows.jsonl?sig=***&v=1" in dumped
