"""`${env:NAME}` is filled in; what else looks like a variable is refused where it would name a folder, and kept in
texts for the model."""

from pathlib import Path

import pytest
from support.processes import exit_of
from support.rows import RecipeWriter

from finetuner.errors import RecipeError
from finetuner.recipe import dump_recipe, flat_values, load
from finetuner.recipe.convert import convert


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCRATCH": "/scratch/me", "LR": "3e-4", "RUN": "2024", "STEPS": "7", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOT_THERE", raising=False)


def values_of(path: Path, *overrides: str) -> dict[str, object]:
    return flat_values(load(path, overrides, check_files=False).recipe)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(path, overrides, check_files=False)
    return str(error.value)


def test_a_variable_is_filled_in_within_a_text_as_all_of_it_and_in_lists(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        output_dir="${env:SCRATCH}/out-${env:RUN}",
        learning_rate="${env:LR}",
        max_steps="${env:STEPS}",
        wandb_project="${env:RUN}",
        datasets=[{"path": "${env:SCRATCH}/rows.jsonl", "type": "alpaca", "data_files": ["a", "${env:RUN}"]}],
    )
    values = values_of(recipe)
    assert values["output_dir"] == "/scratch/me/out-2024"
    assert values["learning_rate"] == 3e-4 and values["max_steps"] == 7
    assert values["wandb_project"] == "2024"  # a name stays text
    entry = values["datasets"][0]
    assert entry["path"] == "/scratch/me/rows.jsonl" and entry["data_files"] == ["a", "2024"]


def test_a_variable_in_an_override_is_filled_in(write_recipe: RecipeWriter) -> None:
    values = values_of(write_recipe(), "output_dir=${env:SCRATCH}/o", "learning_rate=${env:LR}")
    assert values["output_dir"] == "/scratch/me/o" and values["learning_rate"] == 3e-4


def test_a_list_and_a_switch_may_come_from_the_environment(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITCH", "true")
    monkeypatch.setenv("SETS", "[{path: rows.jsonl, type: completion}]")
    values = values_of(write_recipe(bf16="${env:SWITCH}", datasets="${env:SETS}"))
    assert values["bf16"] is True and values["datasets"][0]["type"] == "completion"


@pytest.mark.parametrize("name, state", [("NOT_THERE", "is not set"), ("EMPTY", "is empty")])
def test_a_variable_that_is_not_there_is_an_error_at_its_place(
    write_recipe: RecipeWriter, name: str, state: str
) -> None:
    recipe = write_recipe(output_dir=f"${{env:{name}}}/out")
    message = refusal(recipe)
    line = next(i for i, text in enumerate(recipe.read_text().splitlines(), 1) if text.startswith("output_dir"))
    assert f"{recipe}:{line}:" in message and f"variable {name} {state}. Set it: export {name}=..." in message
    assert "<override 1>" in refusal(write_recipe(), f"output_dir=${{env:{name}}}")


OTHERS = {
    "${SCRATCH}/out": "${env:SCRATCH}",
    "runs/${NAME}": "${env:NAME}",
    "${SCRATCH:-/tmp}/out": "${env:SCRATCH}",
    "${env:SCRATCH:-/tmp}": "${env:SCRATCH}",
    "${oc.env:SCRATCH}/out": "${env:SCRATCH}",
    "${now:%Y-%m-%d}": "${env:now}",
    "${}": "${env:NAME}",
    "${SCRATCH": "${env:SCRATCH}",
    "$(pwd)/out": "${env:NAME}",
    "$SCRATCH/out": "${env:SCRATCH}",
    "/data/$USER/out": "${env:USER}",
    "$env:SCRATCH/out": "${env:SCRATCH}",
    "%USERPROFILE%/out": "${env:USERPROFILE}",
}


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("key", ["output_dir", "base_model", "hub_model_id", "dataset_prepared_path"])
def test_another_variable_is_refused_with_what_to_write(write_recipe: RecipeWriter, key: str, text: str) -> None:
    message = refusal(write_recipe(**{key: text}))
    assert f"{key}: '" in message and OTHERS[text] in message and "would stay as it is written" in message


def test_another_variable_is_refused_in_lists_blocks_and_overrides(write_recipe: RecipeWriter) -> None:
    message = refusal(write_recipe(datasets=[{"path": "${DATA}/rows.jsonl", "type": "alpaca"}]))
    assert "datasets.0.path: '${DATA}' would stay" in message and "${env:DATA}" in message
    assert "${env:OUT}" in refusal(write_recipe(), "output_dir=${OUT}")
    assert "${env:N}" in refusal(write_recipe(learning_rate="${N}"))


def test_texts_for_a_model_keep_what_looks_like_a_variable(write_recipe: RecipeWriter, rows_file: Path) -> None:
    form = {"system_prompt": "Write bash: ${HOME} $(pwd) $PATH %d%", "format": "$x {instruction}"}
    recipe = write_recipe(
        datasets=[{"path": str(rows_file), "type": form}],
        tokens=["${a}"],
        special_tokens={"pad_token": "${pad}"},
        lora_target_modules="self_attn.(q|v)_proj$",
        adapter="lora",
    )
    values = values_of(recipe)
    assert values["datasets"][0]["type"]["system_prompt"] == form["system_prompt"]
    assert values["tokens"] == ["${a}"] and values["lora_target_modules"] == "self_attn.(q|v)_proj$"
    template = write_recipe(chat_template="jinja", chat_template_jinja="{{ '${x}' }}{{ messages[0].content }}")
    assert values_of(template)["chat_template_jinja"] == "{{ '${x}' }}{{ messages[0].content }}"


def test_names_with_a_dollar_or_percent_sign_that_are_no_variables_stay(write_recipe: RecipeWriter) -> None:
    for path in ("cost in $.jsonl", "a$b.jsonl", "https://host/%E4%BD%A0/rows.jsonl", "100%/rows.jsonl", "5$/x.json"):
        entry = {"path": path, "type": "alpaca"}
        assert values_of(write_recipe(datasets=[entry]))["datasets"][0]["path"] == path
    assert values_of(write_recipe(datasets=[{"path": "a/b", "type": "alpaca", "split": "train[:10%]"}]))


def test_a_file_that_has_such_a_name_is_read(write_recipe: RecipeWriter, rows_file: Path) -> None:
    odd = rows_file.rename(rows_file.with_name("$rows.jsonl"))
    entry = {"path": str(odd), "type": "alpaca"}
    assert load(write_recipe(datasets=[entry])).recipe.data.datasets[0].path == str(odd)


def test_a_secret_is_not_filled_in_where_it_would_be_saved(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("TOKENIZER", "some/model")
    for keys in ({"wandb_project": "${env:HF_TOKEN}"}, {"hub_token": "${env:HF_TOKEN}"}):
        message = refusal(write_recipe(**keys))
        assert "hf_abcdef" not in message and next(iter(keys)) in message
    assert values_of(write_recipe(tokenizer="${env:TOKENIZER}"))["tokenizer"] == "some/model"
    address = "https://user:${env:HF_TOKEN}@host/rows.jsonl"  # hidden where it is saved, as when it is written out
    loaded = load(write_recipe(datasets=[{"path": address, "type": "alpaca"}]), check_files=False)
    assert loaded.recipe.data.datasets[0].path == "https://user:hf_abcdef@host/rows.jsonl"
    assert "hf_abcdef" not in dump_recipe(loaded.recipe, "saved")


def test_the_saved_recipe_has_the_value_and_loads_without_the_variable(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(write_recipe(output_dir="${env:SCRATCH}/out"))
    saved = tmp_path / "saved.yml"
    saved.write_text(dump_recipe(loaded.recipe, "saved"))
    monkeypatch.delenv("SCRATCH")
    assert load(saved).recipe == loaded.recipe


def test_a_value_that_holds_a_variable_itself_is_refused(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTER", "${INNER}/x")
    assert "${env:INNER}" in refusal(write_recipe(output_dir="${env:OUTER}"))


def test_check_says_it_too(write_recipe: RecipeWriter, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("check", write_recipe(output_dir="${SCRATCH}/out")) == 2
    assert "${env:SCRATCH}" in capsys.readouterr().err


def test_a_conversion_keeps_the_variable_and_refuses_others(tmp_path: Path) -> None:
    recipe = tmp_path / "trl.yml"
    text = "model_name_or_path: a/b\ndataset_name: c/d\nlearning_rate: 1e-4\noutput_dir: '{}/out'\nmax_length: 64\n"
    recipe.write_text(text.format("${env:NOT_THERE}"))
    assert "${env:NOT_THERE}/out" in convert(recipe).text
    recipe.write_text(text.format("${SCRATCH}"))
    with pytest.raises(RecipeError, match=r"\$\{env:SCRATCH\}"):
        convert(recipe)


# --- the text of a recipe ---

WRITTEN = "base_model: m\noutput_dir: out\nlearning_rate: 1e-4\ndatasets:\n- {path: rows.jsonl, type: alpaca}\n"


@pytest.mark.parametrize("form", ["windows", "byte order mark", "both"])
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path, form: str) -> None:
    text = WRITTEN if form == "byte order mark" else WRITTEN.replace("\n", "\r\n")
    recipe = tmp_path / "r.yml"
    recipe.write_bytes((b"" if form == "windows" else b"\xef\xbb\xbf") + text.encode())
    assert values_of(recipe)["output_dir"] == "out"


def test_anchors_are_written_out_and_take_variables(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        WRITTEN.replace("output_dir: out", "output_dir: &out ${env:SCRATCH}/o\ndataset_prepared_path: *out")
    )
    assert values_of(recipe)["dataset_prepared_path"] == values_of(recipe)["output_dir"] == "/scratch/me/o"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!env HOME"])
def test_a_tag_of_a_language_is_refused(tmp_path: Path, tag: str) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(WRITTEN.replace("output_dir: out", f"output_dir: {tag}"))
    assert "is not supported; write the value plainly" in refusal(recipe)


def test_a_variable_in_a_flow_list_says_to_quote_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(WRITTEN.replace("{path: rows.jsonl,", "{path: ${env:SCRATCH}/rows.jsonl,"))
    assert 'Write a text with ${...} in quotes: "${env:NAME}".' in refusal(recipe)


def test_home_is_filled_in_as_ever(write_recipe: RecipeWriter) -> None:
    values = values_of(write_recipe(output_dir="~/out"), "dataset_prepared_path=~/prepared")
    assert values["output_dir"] == str(Path.home() / "out")
    assert values["dataset_prepared_path"] == str(Path.home() / "prepared")
