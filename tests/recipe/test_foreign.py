"""Recipes of other tools: every key is read, left out with a reason, or refused by name; none in silence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.cli import main
from finetuner.errors import RecipeError
from finetuner.recipe import KEYS, dump_recipe, load
from finetuner.recipe.convert import convert
from finetuner.recipe.foreign.axolotl import PLUGINS, UNSUPPORTED_VALUES
from finetuner.recipe.foreign.tools import ELSEWHERE, LLAMA_FACTORY_TOOL, TRL_TOOL
from finetuner.recipe.foreign.translate import MEANINGS, VALUES

BASE = "base_model: org/model\nlearning_rate: 2e-4\ndatasets:\n  - path: org/data\n    type: alpaca\n"

BOILERPLATE = """
lora_model_dir:
wandb_watch:
wandb_log_model:
strict: false
rl:
gptq: false
local_rank:
sequence_len: 64
warmup_steps: 0
"""

LLAMA_FACTORY = """model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
quantization_bit: 4
dataset: identity
template: qwen3
cutoff_len: 1024
output_dir: saves/x
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""

TRL = """model_name_or_path: org/model
dtype: bfloat16
use_peft: true
lora_r: 16
dataset_name: org/chats
max_length: 512
learning_rate: 2.0e-5
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
lr_scheduler_type: linear
report_to: none
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "r.yml").write_text(text)
        return tmp_path / "r.yml"

    return write


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path)
    return str(caught.value)


def test_boilerplate_of_a_template_is_accepted_and_said_only_on_demand(recipe, capsys) -> None:
    path = recipe(BASE + BOILERPLATE)
    with pytest.raises(SystemExit) as done:
        main(["check", str(path)])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"{path}: no mistakes\n"
    with pytest.raises(SystemExit):
        main(["check", "-v", str(path)])
    said = capsys.readouterr().out
    for key in ("wandb_watch", "strict", "rl", "gptq", "local_rank"):
        assert key in said


@pytest.mark.parametrize("key", sorted(key for key, m in MEANINGS.items() if m.unsupported is not None))
def test_an_unsupported_key_is_refused_by_name_unless_it_is_off(recipe, key: str) -> None:
    message = refusal(recipe(f"{BASE}{key}: some value\n"))
    assert f"r.yml:6:1: '{key}' is not supported yet: {MEANINGS[key].unsupported}." in message
    assert "1 mistake\n" in message
    for off in ("", "false", "[]", "{}") if MEANINGS[key].only_value is None else ("", "true"):
        assert load(recipe(f"{BASE}{key}: {off}\n")).recipe == load(recipe(BASE)).recipe


def test_new_embeddings_at_the_mean_are_what_holds_and_drawn_ones_are_refused_with_the_reason(recipe) -> None:
    (note,) = load(recipe(f"{BASE}mean_resizing_embeddings: true\n")).notes
    assert note.quiet and note.message == "left out: it says what holds anyway"
    said = refusal(recipe(f"{BASE}mean_resizing_embeddings: false\n"))
    assert "not supported yet: new embeddings that are drawn at random" in said
    assert "new rows always start at the mean of the old ones" in said


@pytest.mark.parametrize("key", sorted(key for key, m in MEANINGS.items() if m.without_effect is not None))
def test_a_key_without_effect_says_why(recipe, key: str) -> None:
    (note,) = load(recipe(f"{BASE}{key}: true\n")).notes
    assert (note.keys, note.message) == ((key,), f"without effect: {MEANINGS[key].without_effect}")


@pytest.mark.parametrize("plugin", [*PLUGINS])
def test_fused_losses_are_accepted_with_one_note_that_says_what_does_their_job(recipe, plugin: str) -> None:
    switches = "liger_rope: true\nliger_rms_norm: true\nliger_fused_linear_cross_entropy: true\n"
    loaded = load(recipe(f"{BASE}plugins:\n  - {plugin}\n{switches}"))
    (note,) = (note for note in loaded.notes if not note.quiet)
    assert "chunked loss head" in note.message
    assert "kernels are not applied" in note.message
    assert {"liger_rope", "liger_rms_norm", plugin.rpartition(".")[2]} <= set(note.keys)


def test_any_other_plugin_is_an_error_at_its_line(recipe) -> None:
    message = refusal(recipe(BASE + "plugins:\n  - axolotl.integrations.spectrum.SpectrumPlugin\n"))
    assert "r.yml:7:5: the plugin 'axolotl.integrations.spectrum.SpectrumPlugin' is not supported yet" in message


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("flash_attention: true", "attn_implementation", "auto"),
        ("flash_attention: false", "attn_implementation", "sdpa"),
        ("sdp_attention: true", "attn_implementation", "sdpa"),
        ("xformers_attention: true", "attn_implementation", "sdpa"),
        ("eager_attention: true", "attn_implementation", "eager"),
        ("attn_implementation: xformers", "attn_implementation", "sdpa"),
        ("bfloat16: true", "bf16", True),
        ("float16: true", "fp16", True),
        ("float32: true", "bf16", False),
        ("lr_scheduler: constant_with_warmup", "lr_scheduler", "constant"),
        ("optimizer: adamw_hf", "optimizer", "adamw_torch"),
        ("warmup_steps: 0.1", "warmup_ratio", 0.1),
        ("evals_per_epoch: 0", "evals_per_epoch", None),
        ("sequence_length: 77", "sequence_len", 77),
    ],
)
def test_other_spellings_are_read_with_a_note(recipe, line: str, key: str, value: Any) -> None:
    loaded = load(recipe(f"{BASE}{line}\n"))
    assert getattr(getattr(loaded.recipe, KEYS[key][0]), key) == value
    assert [note.origin.line for note in loaded.notes if note.origin] == [6]


def test_our_key_decides_over_another_tools(recipe) -> None:
    loaded = load(recipe(BASE + "attn_implementation: eager\nflash_attention: true\n"))
    assert loaded.recipe.model.attn_implementation == "eager"
    assert [str(note) for note in loaded.notes] == [
        "line 7: flash_attention without effect: attn_implementation is given"
    ]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in UNSUPPORTED_VALUES.items() for value in values if key in KEYS]
)
def test_a_value_that_other_tools_know_is_refused_by_name(recipe, key: str, value: str) -> None:
    message = refusal(recipe(f"{BASE}{key}: {value}\n"))
    assert f"{key}: '{value}' is not supported yet: {UNSUPPORTED_VALUES[key][value]}." in message


def test_lora_keys_beside_an_empty_adapter_are_boilerplate_and_without_one_a_mistake(recipe) -> None:
    loaded = load(recipe(BASE + "adapter:\nlora_r: 8\nlora_alpha: 16\n"))
    assert [str(note) for note in loaded.notes] == [
        "line 7: lora_r, lora_alpha without effect: adapter is empty, so every weight is trained"
    ]
    assert "lora_r has no effect without `adapter: lora`" in refusal(recipe(BASE + "lora_r: 8\n"))


def test_evaluation_keys_beside_no_held_out_rows_are_boilerplate_and_otherwise_a_mistake(recipe) -> None:
    loaded = load(recipe(BASE + "val_set_size: 0\nevals_per_epoch: 4\n"))
    assert [str(note) for note in loaded.notes] == ["line 7: evals_per_epoch without effect: no row is held out"]
    (note,) = load(recipe(BASE + "evals_per_epoch: 4\n")).notes
    assert not note.quiet and "`val_set_size: 0.05` holds some out" in note.message


def test_a_llama_factory_recipe_becomes_ours_with_its_own_defaults(recipe, tmp_path: Path) -> None:
    result = convert(recipe(LLAMA_FACTORY))
    (tmp_path / "ours.yml").write_text(result.text)
    made = load(tmp_path / "ours.yml", check_files=False).recipe
    assert result.tool == "LLaMA-Factory"
    assert (made.model.base_model, made.adapter.adapter, made.adapter.lora_r) == ("org/model", "qlora", 8)
    assert made.adapter.lora_target_modules == ("q_proj", "v_proj")
    assert (made.batch.micro_batch_size, made.data.sequence_len, made.schedule.lr_scheduler) == (2, 1024, "cosine")
    assert (made.schedule.num_epochs, made.precision.gradient_checkpointing) == (3.0, True)  # its silence
    assert "# lora_rank: 8\nlora_r: 8\n" in result.text
    assert (made.adapter.lora_alpha, made.data.datasets[0].type) == (16, "instruction_chat")


def test_a_trl_recipe_becomes_ours(recipe, tmp_path: Path) -> None:
    result = convert(recipe(TRL))
    (tmp_path / "ours.yml").write_text(result.text)
    made = load(tmp_path / "ours.yml", check_files=False).recipe
    assert (result.tool, made.adapter.adapter, made.data.datasets[0].path) == ("TRL", "lora", "org/chats")
    assert (made.schedule.lr_scheduler, made.data.sequence_len) == ("linear", 512)


@pytest.mark.parametrize(
    ("given", "entries"),
    [
        ("org/corpus", [{"path": "org/corpus"}]),
        ("{path: org/corpus, name: en, type: pretrain}", [{"path": "org/corpus", "name": "en"}]),
        ("[{path: a/b, text_column: body}, c/d]", [{"path": "a/b", "field": "body"}, {"path": "c/d"}]),
    ],
)  # fmt: skip
def test_a_corpus_to_pretrain_on_is_streamed_as_plain_text(
    tmp_path: Path, given: str, entries: list[dict[str, str]]
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(f"base_model: org/model\nlearning_rate: 2e-4\nmax_steps: 7\npretraining_dataset: {given}\n")
    data = load(path).recipe.data
    assert data.streaming
    assert [entry.model_dump(exclude_unset=True) for entry in data.datasets] == [
        entry | {"type": "completion"} for entry in entries
    ]


def test_an_axolotl_recipe_converts_to_the_recipe_it_is_read_as(recipe, tmp_path: Path) -> None:
    boilerplate = BOILERPLATE.replace("sequence_len: 64\n", "")
    path = recipe(BASE + boilerplate + "sequence_length: 512\nflash_attention: true\n")
    result = convert(path)
    (tmp_path / "ours.yml").write_text(result.text)
    made = load(tmp_path / "ours.yml")
    assert made.recipe == load(path).recipe
    assert made.notes == ()
    assert "# sequence_length: 512\nsequence_len: 512\n" in result.text
    assert "# strict: without effect: a recipe is always read strictly" in result.text


@pytest.mark.parametrize("text", [LLAMA_FACTORY, TRL])
def test_training_by_another_tools_recipe_names_the_command_that_converts_it(recipe, text: str) -> None:
    assert "finetuner convert" in refusal(recipe(text))


def test_check_shows_what_maps_and_what_blocks_of_another_tools_recipe(recipe, capsys) -> None:
    with pytest.raises(SystemExit) as done:
        main(["check", str(recipe(LLAMA_FACTORY))])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert "is a recipe of LLaMA-Factory" in out
    assert "line 5: lora_rank is read as lora_r" in out
    assert "do_train" not in out
    with pytest.raises(SystemExit) as done:
        main(["check", str(recipe(LLAMA_FACTORY.replace("stage: sft", "stage: dpo")))])
    assert done.value.code == 2
    assert "r.yml:2:1: 'stage' is not supported yet" in capsys.readouterr().err


def test_convert_writes_nothing_when_a_key_blocks_and_never_over_a_file(recipe, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.yml"
    with pytest.raises(SystemExit) as done:
        main(["convert", str(recipe(TRL + "benchmarks: [gpqa]\nno_such_key: 1\n")), "-o", str(out)])
    assert done.value.code == 2
    err = capsys.readouterr().err
    assert "'benchmarks' is not supported yet" in err
    assert "unknown key 'no_such_key'" in err
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(SystemExit) as done:
        main(["convert", str(recipe(TRL)), "-o", str(out)])
    assert done.value.code == 2
    assert out.read_text() == "mine"


def test_no_key_of_ours_stands_in_another_tools_table() -> None:
    assert sorted(set(MEANINGS) & set(KEYS)) == []
    assert sorted(set(VALUES) - set(KEYS)) == []


@pytest.mark.parametrize("tool", [LLAMA_FACTORY_TOOL, TRL_TOOL], ids=lambda tool: tool.name)
def test_what_other_tools_keys_become_are_keys_of_ours(tool) -> None:
    becoming = {meaning.becomes for meaning in tool.meanings.values() if meaning.becomes}
    assert sorted((becoming | set(tool.defaults)) - set(KEYS)) == []


simple = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(simple, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data())
def test_no_value_of_a_foreign_key_leads_to_a_traceback(data, tmp_path_factory) -> None:
    from ruamel.yaml import YAML

    tool = data.draw(st.sampled_from([LLAMA_FACTORY_TOOL, TRL_TOOL]))
    keys = data.draw(st.dictionaries(st.sampled_from(sorted(tool.meanings)), nested, max_size=6))
    path = tmp_path_factory.mktemp("foreign") / "r.yml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump({"model_name_or_path": "org/model"} | keys, file)
    for read in (convert, load):
        try:
            read(path)
        except RecipeError as error:
            assert str(error)


def test_keys_that_stood_elsewhere_in_older_recipes_are_moved_with_their_places(recipe) -> None:
    old = "tokens:\n  pad_token: <pad>\n  bos_token: <s>\nbnb_4bit_quant_type: fp4\nadapter: qlora\n"
    loaded = load(recipe(BASE + old))
    assert loaded.recipe.tokenizer.special_tokens.pad_token == "<pad>"
    assert loaded.recipe.quantization.bnb_config_kwargs.bnb_4bit_quant_type == "fp4"
    assert "line 7: pad_token is read as special_tokens.pad_token" in map(str, loaded.notes)
    message = refusal(recipe(BASE + "bnb_4bit_quant_type: nf5\nadapter: qlora\n"))
    assert ":6:" in message and "bnb_config_kwargs.bnb_4bit_quant_type" in message
    assert "'bnb_4bit_quant_type' are the same key" in refusal(
        recipe(BASE + "adapter: qlora\nbnb_4bit_quant_type: nf4\nbnb_config_kwargs:\n  bnb_4bit_quant_type: fp4\n")
    )


def test_sharegpt_rows_are_read_as_chats_with_its_column_and_keys(recipe) -> None:
    loaded = load(recipe(BASE.replace("alpaca", "sharegpt")))
    (entry,) = loaded.recipe.data.datasets
    assert (entry.type, entry.field_messages) == ("chat_template", "conversations")
    mappings = entry.message_property_mappings
    assert (mappings.role, mappings.content) == ("from", "value")
    assert [note.origin.line for note in loaded.notes if note.origin] == [5]


@pytest.mark.parametrize("kind", ["alpaca:vicuna", "metharme", "my_rows.transform", "context_qa.load_404"])
def test_row_types_of_axolotls_that_are_not_ours_are_refused_by_name(recipe, kind: str) -> None:
    assert f"type: '{kind}' is not supported yet: " in refusal(recipe(BASE.replace("alpaca", kind)))


@pytest.mark.parametrize(
    ("key", "ours"), [("lora_rank", "lora_r"), ("lr", "learning_rate"), ("cutoff_len", "sequence_len"), ("r", "lora_r")]
)
def test_a_word_of_another_tool_in_a_recipe_of_ours_is_told_ours(recipe, key: str, ours: str) -> None:
    assert f"unknown key '{key}'. It is called {ours} here." in refusal(recipe(f"{BASE}{key}: 8\n"))


def test_names_from_elsewhere_are_of_keys_that_there_are() -> None:
    assert set(ELSEWHERE.values()) <= set(KEYS)
    assert not set(ELSEWHERE) & set(KEYS)


def test_older_names_of_a_messages_parts_are_read_and_dumped_as_ours(recipe, tmp_path: Path) -> None:
    chats = BASE.replace("alpaca", "chat_template\n    message_field_role: from\n    message_field_content: value")
    loaded = load(recipe(chats))
    mappings = loaded.recipe.data.datasets[0].message_property_mappings
    assert (mappings.role, mappings.content) == ("from", "value")
    (tmp_path / "again.yml").write_text(dump_recipe(loaded.recipe, "a copy"))
    assert load(tmp_path / "again.yml", check_files=False).recipe == loaded.recipe
    both = chats + "    message_property_mappings:\n      role: speaker\n"
    assert "'message_field_role' and 'role' are the same key" in refusal(recipe(both))


def test_optimizer_arguments_that_are_keys_of_ours_are_moved_and_an_unknown_optimizers_are_not_judged(recipe) -> None:
    loaded = load(recipe(BASE + "optim_args:\n  eps: 1e-6\n"))
    assert loaded.recipe.optimizer.adam_epsilon == 1e-6
    message = refusal(recipe(BASE + "optimizer: came_pytorch\noptim_args:\n  bf16_stochastic_round: true\n"))
    assert "1 mistake\n" in message and "this optimizer. Write adamw_torch" in message
