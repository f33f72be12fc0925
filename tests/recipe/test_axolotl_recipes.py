"""Recipes as people write them for Axolotl, 2023 to 2026: each key does what it does there, or is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from finetuner.errors import RecipeError
from finetuner.recipe import KEYS, Loaded, Recipe, load
from finetuner.recipe.convert import convert
from finetuner.recipe.foreign.axolotl import DATASET
from finetuner.recipe.foreign.axolotl_defaults import DEFAULTS
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.sections import DatasetEntry

HEAD = "base_model: org/model\nlearning_rate: 2e-4\nsequence_len: 64\nwarmup_steps: 0\n"
ALPACA = HEAD + "datasets:\n  - path: org/data\n    type: alpaca\n"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Loaded]:
    def read_text(text: str, *overrides: str) -> Loaded:
        (tmp_path / "r.yml").write_text(text)
        return load(tmp_path / "r.yml", list(overrides))

    return read_text


@pytest.fixture
def refusal(read) -> Callable[..., str]:
    def refused(text: str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            read(text, *overrides)
        return str(caught.value)

    return refused


def value(recipe: Recipe, key: str) -> Any:
    return dict(dict(recipe)[KEYS[key][0]])[key]


def chats(text: str) -> str:
    return HEAD + f"datasets:\n  - path: org/chats\n    {text}\n"


def entry_of(loaded: Loaded) -> Any:
    (entry,) = loaded.recipe.data.datasets
    return entry


# ---- wording of single keys


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_lora_on_a_4_bit_base_is_qlora_in_a_run_and_in_a_conversion(read, tmp_path: Path, adapter: str) -> None:
    loaded = read(ALPACA + f"adapter: {adapter}\nload_in_4bit: true\nload_in_8bit: false\n")
    assert loaded.recipe.adapter.adapter == "qlora"
    assert ("line 8: adapter 'lora' is read as 'qlora': load_in_4bit is true" in map(str, loaded.notes)) == (
        adapter == "lora"
    )
    converted = convert(tmp_path / "r.yml")
    (tmp_path / "ours.yml").write_text(converted.text)
    assert load(tmp_path / "ours.yml", check_files=False).recipe.adapter.adapter == "qlora"


def test_lora_on_an_8_bit_base_stays_lora(read) -> None:
    assert read(ALPACA + "adapter: lora\nload_in_8bit: true\nload_in_4bit: false\n").recipe.adapter.adapter == "lora"


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ("batch_size: 8\nmicro_batch_size: 2\n", 4),
        ("batch_size: 2\nmicro_batch_size: 2\n", 1),
        ("batch_size: 8\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\n", 4),
    ],
)
def test_a_total_batch_is_accumulated_on_each_rank_as_axolotl_does(read, given: str, steps: int) -> None:
    loaded = read(ALPACA + given)
    assert loaded.recipe.batch.gradient_accumulation_steps == steps


@pytest.mark.parametrize(
    "given",
    [
        "batch_size: 8\n",
        "batch_size: 9\nmicro_batch_size: 2\n",
        "batch_size: 8\nmicro_batch_size: 2\ngradient_accumulation_steps: 2\n",
        "batch_size: many\nmicro_batch_size: 2\n",
    ],
)
def test_a_total_batch_that_cannot_be_divided_is_refused(refusal, given: str) -> None:
    assert "Set gradient_accumulation_steps = batch_size / micro_batch_size" in refusal(ALPACA + given)


EMPTY = """
adapter: qlora
lora_r:
wandb_project:
hub_model_id:
lr_scheduler_kwargs:
special_tokens:
  pad_token:
  eos_token:
fsdp:
fsdp_config:
  fsdp_offload_params:
  fsdp_state_dict_type:
bnb_config_kwargs:
  bnb_4bit_quant_type:
chat_template_kwargs:
  enable_thinking:
deepspeed:
tokens:
"""


def test_a_key_with_nothing_behind_it_means_the_default_inside_blocks_too(read) -> None:
    nulls = "".join(
        f"    {key}:\n" for key in ("name", "split", "revision", "data_files", "ds_type", "shards", "conversation")
    )
    loaded = read(ALPACA + nulls + EMPTY)
    same = read(ALPACA + "adapter: qlora\nfsdp_config:\n  version:\n")
    assert loaded.recipe == same.recipe
    assert entry_of(loaded).split == "train"


@pytest.mark.parametrize("off", ["fsdp_config: {}", "deepspeed: {}", "fsdp: []", 'adapter: ""', 'chat_template: ""'])
def test_an_empty_value_of_a_switch_is_off(read, off: str) -> None:
    assert read(f"{ALPACA}{off}\n").recipe == read(ALPACA).recipe


@pytest.mark.parametrize(
    ("line", "key", "meant"),
    [
        ("tf32: auto", "tf32", True),
        ("torch_compile_mode: max-autotune", "torch_compile_mode", "max-autotune-no-cudagraphs"),
        ("attn_implementation: flex_attention", "attn_implementation", "auto"),
        ("attn_implementation: kernels-community/vllm-flash-attn3", "attn_implementation", "auto"),
        ("flex_attention: true", "attn_implementation", "auto"),
        ("flash_optimum: true", "attn_implementation", "auto"),
        ("evals_per_epoch: 0", "eval_strategy", "no"),
    ],
)
def test_another_word_is_read_with_a_note(read, line: str, key: str, meant: Any) -> None:
    compiled = "torch_compile: true\n" if key.startswith("torch") else ""
    loaded = read(f"{ALPACA}val_set_size: 0.1\n{compiled}{line}\n")
    assert value(loaded.recipe, key) == meant
    assert any("is read as" in note.message and not note.quiet for note in loaded.notes)


@pytest.mark.parametrize(
    "line",
    [
        "fused_attn_kernel: true",
        "tiled_mlp: true",
        "selective_checkpointing: {save: [attention]}",
    ],
)
def test_a_kernel_or_a_saving_that_changes_no_result_is_said_and_does_nothing(read, line: str) -> None:
    loaded = read(f"{ALPACA}{line}\n")
    (note,) = loaded.notes
    assert not note.quiet and "the same" in note.message
    assert loaded.recipe == read(ALPACA).recipe


@pytest.mark.parametrize("spelling", ["fsdp_{}", "{}"])
@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("sharding_strategy", "1", "full_shard"),
        ("sharding_strategy", '"1"', "full_shard"),
        ("sharding_strategy", "FULL_SHARD", "full_shard"),
        ("backward_prefetch", "BACKWARD_POST", "BACKWARD_PRE"),
        ("backward_prefetch", "no_prefetch", "BACKWARD_PRE"),
        ("state_dict_type", "sharded_state_dict", "SHARDED_STATE_DICT"),
        ("auto_wrap_policy", "transformer_based_wrap", "TRANSFORMER_BASED_WRAP"),
        ("use_orig_params", "false", True),
    ],
)
def test_older_forms_of_fsdps_keys_are_read(read, spelling: str, key: str, value: str, meant: Any) -> None:
    loaded = read(f"{ALPACA}fsdp: full_shard auto_wrap\nfsdp_config:\n  {spelling.format(key)}: {value}\n")
    assert dict(loaded.recipe.sharding.fsdp_config)[key] == meant
    assert loaded.recipe.sharding.fsdp == ("full_shard", "auto_wrap")


@pytest.mark.parametrize("key", ["landmark_attention", "xpos_rope", "log_sweep_min_lr", "scaling_softmax"])
def test_a_key_of_old_templates_may_stand_empty_and_is_refused_when_it_asks(read, refusal, key: str) -> None:
    assert read(f"{ALPACA}{key}:\n").recipe == read(ALPACA).recipe
    assert f"'{key}' is not supported yet" in refusal(f"{ALPACA}{key}: true\n")


@pytest.mark.parametrize("kind", ["AutoModelForSequenceClassification", "LlamaForTokenClassification"])
def test_a_model_that_is_no_language_model_is_refused_and_a_language_models_class_is_its_configs(
    read, refusal, kind: str
) -> None:
    assert f"model_type: '{kind}' is not supported yet" in refusal(f"{ALPACA}model_type: {kind}\n")
    for known in ("MixtralForCausalLM", "AutoModelForCausalLM", "LlamaForCausalLM"):
        assert read(f"{ALPACA}model_type: {known}\n").recipe == read(ALPACA).recipe


def test_rows_of_a_parameter_are_refused_and_whole_ones_are_named(read, refusal) -> None:
    said = refusal(ALPACA + "unfrozen_parameters:\n  - ^lm_head\n  - ^model.embed_tokens.weight$[:32000]\n")
    assert "r.yml:10:5: unfrozen_parameters: '^model.embed_tokens.weight$[:32000]' is not supported yet" in said
    assert "1 mistake" in said
    loaded = read(ALPACA + "unfrozen_parameters:\n  - model.layers.2[0-9]+.mlp\n")
    assert loaded.recipe.adapter.unfrozen_parameters == ("model.layers.2[0-9]+.mlp",)


def test_a_head_named_beside_every_linear_layer_is_not_left_out_in_silence(read, refusal) -> None:
    linear = ALPACA + "adapter: lora\nlora_target_linear: true\nlora_target_modules: [q_proj, "
    assert "so 'lm_head' would be left out" in refusal(linear + "lm_head]\n")
    assert read(linear + "v_proj]\n").recipe.adapter.lora_target_linear


def test_additional_special_tokens_are_added_behind_the_others(read) -> None:
    more = 'tokens: ["<a>"]\nspecial_tokens:\n  pad_token: "<pad>"\n  additional_special_tokens: ["<a>", "<b>"]\n'
    loaded = read(ALPACA + more)
    assert loaded.recipe.tokenizer.tokens == ("<a>", "<b>")
    assert loaded.recipe.tokenizer.special_tokens.pad_token == "<pad>"
    assert "line 11: additional_special_tokens is read as tokens: words of the vocabulary" in map(str, loaded.notes)


# ---- rows


@pytest.mark.parametrize(
    ("kind", "column", "role", "content"),
    [
        ("sharegpt", "conversations", "from", "value"),
        ("sharegpt:chat", "conversations", "from", "value"),
        ("sharegpt.load", "conversations", "from", "value"),
        ("sharegpt_simple", "conversations", "from", "value"),
        ("sharegpt.load_role", "conversations", "role", "value"),
        ("sharegpt_simple.load_role", "conversations", "role", "value"),
        ("sharegpt.load_guanaco", "conversations", "role", "text"),
        ("sharegpt.load_ultrachat", "messages", "role", "content"),
    ],
)
def test_sharegpts_row_types_have_the_column_and_keys_that_axolotl_read(read, kind, column, role, content) -> None:
    loaded = read(chats(f"type: {kind}"))
    entry = entry_of(loaded)
    names = entry.message_property_mappings
    assert (entry.type, entry.field_messages, names.role, names.content) == ("chat_template", column, role, content)
    assert any(f"'{kind}' is read as chat_template" in str(note) and not note.quiet for note in loaded.notes)


def test_keys_of_the_recipe_stand_above_sharegpts_own(read) -> None:
    entry = entry_of(read(chats("type: sharegpt\n    field_messages: turns\n    roles:\n      input: [ask]")))
    assert (entry.field_messages, entry.roles) == ("turns", {"user": ("ask",)})
    spoken = "field_human: usr\n    field_model: bot\n    roles: {input: [ask], user: [me]}"
    entry = entry_of(read(chats(f"type: sharegpt\n    {spoken}")))
    assert entry.roles == {"user": ("ask", "me", "usr"), "assistant": ("bot",)}


@pytest.mark.parametrize("kind", ["sharegpt.load_glaive", "sharegpt_jokes"])
def test_sharegpts_other_types_are_refused_with_those_that_are_read(refusal, kind: str) -> None:
    said = refusal(chats(f"type: {kind}"))
    assert f"'{kind}' is not supported yet: rows of this shape. Read here: sharegpt, " in said


@pytest.mark.parametrize("kind", ["sharegpt", "chat_template"])
def test_the_conversation_chatml_is_the_chat_template_of_that_name_and_others_are_refused(
    read, refusal, kind: str
) -> None:
    loaded = read(chats(f"type: {kind}\n    conversation: chatml"))
    assert entry_of(loaded).chat_template == "chatml"
    assert any("2023 and 2024 wrote 'You are a helpful assistant.'" in note.message for note in loaded.notes)
    for name in ("vicuna_v1.1", "llama-2", "mistral"):
        said = refusal(chats(f"type: {kind}\n    conversation: {name}"))
        assert f"'conversation' is not supported yet: FastChat's conversation '{name}'. Write chat_template:" in said
    assert "Remove it" in refusal(ALPACA + "    conversation: chatml\n")


@pytest.mark.parametrize("line", ["bfloat16: off", "flash_attention: No", "use_eaft: no", "sdp_attention: yes"])
def test_a_word_of_yaml_1_1_is_no_switch(refusal, line: str) -> None:
    key, _, word = line.partition(": ")
    assert f"{key} is the text '{word}', but must be true or false." in refusal(f"{ALPACA}{line}\n")


def test_fastchats_llama_3_is_the_chat_template_llama3(read, refusal) -> None:
    loaded = read(chats("type: sharegpt\n    conversation: llama-3"))
    assert entry_of(loaded).chat_template == "llama3"
    assert not any("You are a helpful assistant" in note.message for note in loaded.notes)
    older = read(chats("type: sharegpt\n    conversation: llama3"))
    assert entry_of(older).chat_template == "llama3"
    assert any("'You are a helpful assistant.'" in note.message for note in older.notes)
    both = "type: chat_template\n    chat_template: chatml\n    conversation: llama-3"
    assert "FastChat's conversation 'llama-3'" in refusal(chats(both))


def test_the_conversation_of_alpaca_chat_names_its_style(read, refusal) -> None:
    styled = entry_of(read(chats("type: alpaca_chat.load\n    conversation: chatml")))
    assert styled.type.no_input_format.endswith("<|im_start|>assistant\n")
    assert "alpaca_chat' is not supported yet" in refusal(chats("type: alpaca_chat\n    conversation: vicuna"))


def test_a_template_that_has_two_names_is_one_for_the_recipe_and_for_a_dataset(read) -> None:
    assert read(ALPACA + "chat_template: gemma4_unified\n").recipe.data.chat_template == "gemma4"
    assert entry_of(read(chats("type: chat_template\n    chat_template: gemma4_unified"))).chat_template == "gemma4"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_usual_name_of_thoughts_is_read_anyway_and_another_is_mapped(read, name: str) -> None:
    loaded = read(chats(f"type: chat_template\n    field_thinking: {name}\n    template_thinking_key: {name}"))
    assert entry_of(loaded) == entry_of(read(chats("type: chat_template")))
    assert all(note.quiet for note in loaded.notes)
    mapped = entry_of(read(chats("type: chat_template\n    field_thinking: cot")))
    assert mapped.message_property_mappings.reasoning_content == "cot"
    named = entry_of(read(chats(f"type: chat_template\n    message_property_mappings: {{{name}: cot}}")))
    assert named.message_property_mappings.reasoning_content == "cot"


def test_a_name_of_thoughts_that_no_template_here_is_given_is_refused(refusal) -> None:
    said = refusal(chats("type: chat_template\n    template_thinking_key: inner_voice"))
    assert "the name 'inner_voice' of thoughts in a template" in said


def test_calls_and_their_ids_may_have_other_names(read) -> None:
    names = "{role: from, content: value, tool_calls: calls, tool_call_id: of, name: who}"
    given = entry_of(read(chats(f"type: chat_template\n    message_property_mappings: {names}")))
    mapped = given.message_property_mappings
    assert (mapped.tool_calls, mapped.tool_call_id, mapped.name) == ("calls", "of", "who")


@pytest.mark.parametrize("key", ["drop_system_message", "split_thinking"])
def test_an_edit_of_messages_belongs_to_chats(read, refusal, key: str) -> None:
    assert dict(entry_of(read(chats(f"type: chat_template\n    {key}: true"))))[key] is True
    assert f"{key} is for `type: chat_template`" in refusal(ALPACA + f"    {key}: true\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("message_field_training_detail: parts", "training on parts of a message"),
        ("skip: 100", "leaving out the first rows of a stream"),
        ("input_transform: mod.fn", "code in a recipe"),
        ("trust_remote_code: true", "dataset scripts"),
        ("train_on_inputs: true", "learning the prompts of one dataset alone"),
    ],
)
def test_what_an_entry_asks_for_that_is_not_there_is_refused_by_name(refusal, line: str, said: str) -> None:
    assert f"is not supported yet: {said}" in refusal(chats(f"type: chat_template\n    {line}"))


@pytest.mark.parametrize("kind", ["customllama3-regex", "dan-chat-advanced", "my_rows.transform", "gpt4all"])
def test_a_type_that_is_a_module_of_somebodys_own_is_refused_by_name_and_a_slip_is_told(refusal, kind: str) -> None:
    assert f"type: '{kind}' is not supported yet: rows made by a Python module" in refusal(chats(f"type: {kind}"))
    assert "Did you mean 'chat_template'?" in refusal(chats("type: chat_templates"))


@pytest.mark.parametrize("line", ["max_steps: -1", "max_steps: 0", "neftune_noise_alpha: 0", "evals_per_epoch:"])
def test_a_number_that_switches_off_there_is_off_here(read, line: str) -> None:
    assert read(f"{ALPACA}{line}\n").recipe == read(ALPACA).recipe


def test_a_stream_that_saves_by_epochs_saves_at_those_parts_of_max_steps(read) -> None:
    corpus = HEAD + "max_steps: 305\npretraining_dataset:\n  - path: org/corpus\n    text_column: body\n"
    assert read(corpus + "saves_per_epoch: 1\nnum_epochs: 1\n").recipe.output.save_steps == 305
    assert read(corpus + "saves_per_epoch: 2\nevals_per_epoch: 0\n").recipe.output.save_steps == 153
    assert entry_of(read(corpus)).field == "body"


@pytest.mark.parametrize(
    "override", ["pretraining_dataset=x.txt", "pretraining_dataset.0.path=x.txt", "pretraining_dataset=[]"]
)
def test_an_override_by_another_tools_key_is_taken_or_is_told_ours(read, refusal, override: str) -> None:
    if override.endswith("[]"):
        assert read(ALPACA, override).recipe == read(ALPACA).recipe
        return
    said = refusal(ALPACA, override)
    assert "<override 1>" in said and "pretraining_dataset" in said and "called datasets" in said


def test_two_keys_that_say_what_to_train_on_are_an_error_that_names_ours(refusal) -> None:
    said = refusal(ALPACA + "pretraining_dataset: x.txt\n")
    assert "'pretraining_dataset' and 'datasets' both say what to train on" in said and "called datasets" in said


simple = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(simple, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))
words = st.sampled_from(
    ["sharegpt", "alpaca_chat", "chat_template", "jeopardy", "a.b", "metharme", "chatml", "thinking"]
)
in_entries = sorted(
    {*DATASET, *DatasetEntry.model_fields}
    | {"conversation", "field_human", "field_model", "field_thinking", "template_thinking_key"}
)
in_recipes = sorted(
    {*MEANINGS, "tokens", "special_tokens", "unfrozen_parameters", "load_in_4bit", "adapter", "plugins"}
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    entry=st.dictionaries(st.sampled_from(in_entries), words | nested, max_size=6),
    keys=st.dictionaries(st.sampled_from(in_recipes), words | nested, max_size=5),
)
def test_no_value_of_axolotls_keys_leads_to_a_traceback(entry, keys, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("axolotl") / "r.yml"
    values = {"base_model": "org/model", "learning_rate": 1e-4, "datasets": [{"path": "org/rows", **entry}], **keys}
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)
    try:
        load(path, check_files=False)
    except RecipeError as error:
        assert str(error)


# ---- whole recipes

OF_2023 = """
base_model: openlm-research/open_llama_3b
base_model_config: openlm-research/open_llama_3b
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
push_dataset_to_hub:
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca:chat
  - path: org/orca
    type: alpaca_w_system.load_open_orca
dataset_prepared_path: last_run_prepared
val_set_size: 0.02
adapter: lora
lora_model_dir:
sequence_len: 1024
max_packed_sequence_len:
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules:
  - gate_proj
  - down_proj
lora_fan_in_fan_out:
wandb_project:
wandb_watch:
wandb_run_id:
wandb_log_model:
output_dir: ./lora-out
batch_size: 16
micro_batch_size: 4
num_epochs: 3
optimizer: paged_adamw_32bit
torchdistx_path:
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: false
fp16: true
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention: true
flash_attention:
gptq_groupsize:
gptq_model_v1:
warmup_steps: 10
eval_steps: 50
save_steps:
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  bos_token: "<s>"
  eos_token: "</s>"
  unk_token: "<unk>"
"""
OF_2024 = """
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
is_mistral_derived_model: true
load_in_8bit: false
load_in_4bit: true
strict: false
chat_template: chatml
datasets:
  - path: teknium/OpenHermes-2.5
    type: sharegpt
    conversation: chatml
dataset_prepared_path: last_run_prepared
val_set_size: 0.01
output_dir: ./out
sequence_len: 8192
sample_packing: true
pad_to_sequence_len: true
eval_sample_packing: false
adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
lora_modules_to_save:
  - embed_tokens
  - lm_head
wandb_project: ""
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
s2_attention:
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
eval_max_new_tokens: 128
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  eos_token: "<|im_end|>"
tokens:
  - "<|im_start|>"
"""
OF_2025 = """
base_model: Qwen/Qwen3-8B
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
strict: false
chat_template: qwen3
datasets:
  - path: org/traces
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    split_thinking: true
    roles:
      user: [human]
      assistant: [gpt]
      tool: [observation]
    roles_to_train: [assistant]
    train_on_eos: turn
eot_tokens:
  - <|im_end|>
val_set_size: 0.0
output_dir: ./outputs/out
dataset_prepared_path: last_run_prepared
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
load_in_4bit: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, down_proj, up_proj]
lora_mlp_kernel: true
lora_qkv_kernel: true
lora_o_kernel: true
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: auto
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
"""


def test_a_recipe_of_2023_means_what_it_did(read) -> None:
    recipe = read(OF_2023).recipe
    first, second = recipe.data.datasets
    assert first.type.no_input_format.startswith("SYSTEM: Below is an instruction")
    assert (second.type.field_system, second.type.field_output) == ("system_prompt", "response")
    assert (recipe.adapter.adapter, recipe.batch.gradient_accumulation_steps) == ("qlora", 4)
    assert (recipe.model.attn_implementation, recipe.precision.fp16) == ("sdpa", True)
    assert recipe.tokenizer.special_tokens.eos_token == "</s>"


def test_a_recipe_of_2024_means_what_it_did(read) -> None:
    recipe = read(OF_2024).recipe
    (entry,) = recipe.data.datasets
    assert (entry.type, entry.chat_template, entry.field_messages) == ("chat_template", "chatml", "conversations")
    assert recipe.adapter.lora_modules_to_save == ("embed_tokens", "lm_head")
    assert recipe.tokenizer.tokens == ("<|im_start|>",)
    assert recipe.guards.loss_watchdog_threshold == 5.0


def test_a_recipe_of_2025_means_what_it_does(read) -> None:
    recipe = read(OF_2025).recipe
    (entry,) = recipe.data.datasets
    assert entry.split_thinking and entry.roles["tool"] == ("observation",)
    assert recipe.data.eot_tokens == ("<|im_end|>",)
    assert recipe.precision.tf32 is True


FSDP = """fsdp: [full_shard, auto_wrap]
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_offload_params: true
  fsdp_use_orig_params: false
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
"""


EVERY_WEIGHT = "adapter:\nlora_r: 8\nlora_alpha: 16\nlora_target_modules: [q_proj]\nlora_fan_in_fan_out:\n"


@pytest.mark.parametrize(
    "text",
    [OF_2023, OF_2024, OF_2025, ALPACA + FSDP, ALPACA + EVERY_WEIGHT],
    ids=["2023", "2024", "2025", "fsdp", "every weight"],
)
def test_a_conversion_is_the_recipe_that_a_run_reads(read, tmp_path: Path, text: str) -> None:
    recipe = read(text).recipe
    (tmp_path / "ours.yml").write_text(convert(tmp_path / "r.yml").text)
    assert load(tmp_path / "ours.yml").recipe == recipe


def test_a_recipe_of_axolotls_that_leaves_out_a_key_with_another_default_there_is_told(read) -> None:
    cut = OF_2024.replace("sequence_len: 8192\n", "", 1).replace("warmup_steps: 10\n", "")
    said = {note.keys[0]: note for note in read(cut).notes}
    for (key, *_), (theirs, ours) in DEFAULTS.items():
        assert not said[key].quiet
        assert said[key].message == f"is not given: Axolotl takes {theirs} then, and here it is {ours}. " + (
            "Write what you mean"
        )
    whole = [note for note in read(OF_2024).notes if "is not given: Axolotl" in note.message]
    assert whole == []
    ours = ALPACA.replace("sequence_len: 64\n", "").replace("warmup_steps: 0\n", "")
    assert read(ours).notes == ()  # a recipe without Axolotl's own keys is one of ours
