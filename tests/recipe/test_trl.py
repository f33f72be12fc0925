"""A recipe of TRL's becomes one that trains what TRL trains, or says what differs."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.places import ROOT

from finetuner.data.first_row import first_row_at_hand
from finetuner.errors import RecipeError
from finetuner.recipe import KEYS, load
from finetuner.recipe.convert import Converted, convert
from finetuner.recipe.foreign.tools import AXOLOTL_TOOL, LLAMA_FACTORY_TOOL, TRL_TOOL, tool_of

BASE = {"model_name_or_path": "org/model", "dataset_name": "org/chats"}

# TRL 1.16.0 (dataclasses SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig) on transformers 5.23:
# field -> the default there.
TRL_1_16: dict[str, Any] = {
    # SFTConfig, where transformers has no such field or another default
    "learning_rate": 2e-5, "bf16": None, "gradient_checkpointing": True, "logging_steps": 10,
    "model_init_kwargs": None, "trust_remote_code": False, "router_aux_loss_coef": None, "chat_template_path": None,
    "dataset_text_field": "text", "dataset_kwargs": None, "dataset_num_proc": None, "eos_token": None,
    "max_length": 1024, "truncation_mode": "keep_start", "shuffle_dataset": False, "packing": False,
    "packing_strategy": "bfd", "padding_free": False, "pad_to_multiple_of": "auto", "eval_packing": None,
    "completion_only_loss": None, "assistant_only_loss": False, "loss_type": "nll", "activation_offloading": False,
    "pad_token": None,
    # ModelConfig
    "model_revision": "main", "dtype": "float32", "attn_implementation": None, "use_peft": False, "lora_r": 16,
    "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": None, "lora_target_parameters": None,
    "lora_modules_to_save": None, "lora_task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False,
    "load_in_8bit": False, "load_in_4bit": False, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": None,
    # ScriptArguments and DatasetMixtureConfig
    "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test", "dataset_streaming": False,
    "ignore_bias_buffers": False, "streaming": False, "test_split_size": None,
}  # fmt: skip

# transformers 5.23, training_args.py: the defaults that TRL leaves as they are, and that say something of the training
TRAINER_5_23: dict[str, Any] = {
    "per_device_train_batch_size": 8, "num_train_epochs": 3.0, "max_steps": -1, "lr_scheduler_type": "linear",
    "warmup_steps": 0, "optim": "adamw_torch_fused", "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8, "gradient_accumulation_steps": 1, "average_tokens_across_devices": True,
    "max_grad_norm": 1.0, "label_smoothing_factor": 0.0, "seed": 42, "eval_strategy": "no",
    "per_device_eval_batch_size": 8, "save_strategy": "steps", "save_steps": 500, "save_total_limit": None,
    "push_to_hub": False, "hub_strategy": "every_save", "report_to": "none", "train_sampling_strategy": "random",
    "project": "huggingface", "dataloader_drop_last": False,
}  # fmt: skip

# what those defaults are here: our key -> the value that a recipe has that says nothing of it
OURS: dict[str, Any] = {
    "learning_rate": 2e-5, "bf16": True, "gradient_checkpointing": True, "logging_steps": 10,
    "sequence_len": 1024, "excess_length_strategy": "truncate", "sample_packing": False, "train_on_inputs": True,
    "micro_batch_size": 8, "num_epochs": 3.0, "max_steps": None, "lr_scheduler": "linear", "warmup_steps": None,
    "optimizer": "adamw_torch_fused", "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "label_smoothing_factor": 0.0, "seed": 42,
    "test_datasets": (), "val_set_size": 0.0, "save_steps": 500, "save_total_limit": 0, "hub_model_id": None,
    "use_wandb": None, "use_tensorboard": False, "use_mlflow": None, "use_trackio": None, "adapter": None,
    "group_by_length": False,
}  # fmt: skip
OURS_WITH_LORA = {
    "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": "peft-default",
    "lora_modules_to_save": None, "peft_use_rslora": False, "peft_use_dora": False,
}  # fmt: skip


def write(folder: Path, values: dict[str, Any], name: str = "trl.yml") -> Path:
    (folder / name).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return folder / name


def converted(folder: Path, **keys: Any) -> Converted:
    values = {key: value for key, value in {**BASE, **keys}.items() if value is not ...}
    return convert(write(folder, values), first_row=first_row_at_hand)


def ours(folder: Path, **keys: Any) -> Any:
    """The recipe that a conversion is, loaded: key -> value."""
    (folder / "ours.yml").write_text(converted(folder, **keys).text)
    recipe = load(folder / "ours.yml", check_files=False).recipe
    return {key: getattr(getattr(recipe, section), key) for key, (section, _) in KEYS.items()}


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        converted(folder, **keys)
    return str(caught.value)


def remarks(result: Converted) -> str:
    return "\n".join(str(note) for note in result.notes if not note.quiet)


def rows(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def test_what_trl_does_when_nothing_is_said_is_in_the_converted_recipe(tmp_path: Path) -> None:
    made = ours(tmp_path)
    assert {key: made[key] for key in OURS} == OURS
    made = ours(tmp_path, use_peft=True)
    assert {key: made[key] for key in OURS_WITH_LORA} == OURS_WITH_LORA


def test_saying_trls_defaults_changes_nothing(tmp_path: Path) -> None:
    silent = ours(tmp_path)
    # a recipe that names a text column has rows of text; how many rows an evaluation takes at once is no matter
    more = ("dataset_text_field", "per_device_eval_batch_size")
    said = {key: value for key, value in {**TRL_1_16, **TRAINER_5_23}.items() if key not in more}
    same_by_other_words = {"save_strategy": "steps", "eval_strategy": "no", "warmup_steps": 0, "load_in_4bit": False}
    assert ours(tmp_path, **said) == silent | same_by_other_words


@pytest.mark.parametrize("key", [*TRL_1_16, *TRAINER_5_23])
def test_each_key_of_trl_is_translated_ignored_or_blocked_by_name(tmp_path: Path, key: str) -> None:
    for value in (7, True, "some_text", ["some_text"], {"some": "block"}):
        try:
            converted(tmp_path, **{key: value})
        except RecipeError as error:
            assert f"unknown key '{key}'" not in str(error)


def test_each_key_of_transformers_arguments_is_translated_ignored_or_blocked_by_name() -> None:
    from transformers import TrainingArguments

    rewritten = {"push_to_hub", "report_to", "run_name", "project", "local_rank"}
    known = set(TRL_TOOL.meanings) | set(KEYS) | rewritten
    assert [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in known] == []


def test_the_golden_defaults_are_those_of_the_installed_transformers() -> None:
    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert {key: theirs[key] for key in TRAINER_5_23} == TRAINER_5_23


def test_the_golden_defaults_are_those_of_the_installed_trl() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl: pip install trl==1.16.0 peft")
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    theirs = {
        field.name: field.default
        for kind in (DatasetMixtureConfig, ScriptArguments, ModelConfig, SFTConfig)
        for field in dataclasses.fields(kind)
    }
    assert {key: theirs[key] for key in {**TRL_1_16, **TRAINER_5_23}} == {**TRL_1_16, **TRAINER_5_23}


# which tokens are learned


@pytest.mark.parametrize(
    ("row", "keys", "kind", "learns_prompts"),
    [
        (CHAT, {}, "chat_template", True),
        (CHAT, {"assistant_only_loss": True}, "chat_template", False),
        (CHAT, {"completion_only_loss": True}, "chat_template", True),
        ({"prompt": "a", "completion": "b"}, {}, "prompt_completion", False),
        ({"prompt": "a", "completion": "b"}, {"completion_only_loss": False}, "prompt_completion", True),
        ({"prompt": "a", "completion": "b", "messages": []}, {}, "prompt_completion", False),
        ({"text": "a"}, {}, "completion", False),
        ({"body": "a", "n": 1}, {"dataset_text_field": "body"}, "completion", False),
        ({"conversations": [{"from": "human", "value": "a"}]}, {}, "chat_template", True),
        ({"input_ids": [1, 2], "labels": [1, 2]}, {"dataset_kwargs": {"skip_prepare_dataset": True}}, None, False),
    ],
)
def test_the_first_row_says_the_type_and_trl_which_tokens_are_learned(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], kind: str | None, learns_prompts: bool
) -> None:
    made = ours(tmp_path, dataset_name=rows(tmp_path, row), **keys)
    (entry,) = made["datasets"]
    assert (entry.type, made["train_on_inputs"]) == (kind, learns_prompts)
    if "body" in row:
        assert entry.field == "body"
    if "conversations" in row:
        assert (entry.field_messages, entry.message_property_mappings.role) == ("conversations", "from")


def test_columns_that_mean_something_here_alone_are_left_out_by_name(tmp_path: Path) -> None:
    path = rows(tmp_path, {**CHAT, "system": "Be kind.", "loss_mask": 0, "source": "web"})
    (entry,) = ours(tmp_path, dataset_name=path)["datasets"]
    assert entry.unused_columns == ("loss_mask", "system")
    said = remarks(converted(tmp_path, dataset_name=path))
    assert "TRL does not read the columns loss_mask, system of the rows" in said
    (entry,) = ours(tmp_path, dataset_name=rows(tmp_path, {**CHAT, "tools": [], "chat_template_kwargs": {}}))[
        "datasets"
    ]
    assert entry.unused_columns == "refuse", "TRL reads both"
    chosen = {"datasets": [{"path": path, "columns": ["messages"]}]}
    rows(tmp_path, {**CHAT, "tools": [], "source": "web"})
    (entry,) = ours(tmp_path, dataset_name=..., dataset_mixture=chosen)["datasets"]
    assert entry.unused_columns == ("source", "tools"), "columns that are not chosen are not read"


@pytest.mark.parametrize(
    ("row", "keys", "says"),
    [
        ({"chosen": [], "rejected": []}, {}, "preference learning is not supported"),
        ({"question": "a", "answer": "b"}, {}, "columns answer, question, of which TRL trains on none"),
        ({"input_ids": [1]}, {}, "tokens (input_ids) without labels"),
        ({"text": "a"}, {"assistant_only_loss": True}, "assistant_only_loss is true, but the rows are plain texts"),
        ({"image": "x", **CHAT}, {}, "images"),
    ],
)
def test_rows_that_trl_would_not_train_on_are_refused(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], says: str
) -> None:
    assert says in refusal(tmp_path, dataset_name=rows(tmp_path, row), **keys)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({}, "chat_template"),
        ({"assistant_only_loss": True}, "chat_template"),
        ({"completion_only_loss": True}, "prompt_completion"),
        ({"dataset_text_field": "content"}, "completion"),
    ],
)
def test_rows_that_are_not_at_hand_are_told_by_the_keys_with_a_remark(
    tmp_path: Path, keys: dict[str, Any], kind: str
) -> None:
    result = converted(tmp_path, **keys)
    assert yaml.safe_load(result.text)["datasets"][0]["type"] == kind
    assert "are not at hand" in remarks(result)
    assert "# NOTE: TRL tells the kind of rows by their columns" in result.text


def test_rows_at_hand_need_no_remark(tmp_path: Path) -> None:
    result = converted(tmp_path, dataset_name=rows(tmp_path, CHAT))
    assert "NOTE" not in result.text


# datasets


def test_configuration_and_splits_go_into_the_entries(tmp_path: Path) -> None:
    keys = {"dataset_config": "all", "dataset_train_split": "train_sft", "dataset_test_split": "test_sft"}
    made = ours(tmp_path, **keys, eval_strategy="epoch")
    (entry,), (held_out,) = made["datasets"], made["test_datasets"]
    assert (entry.name, entry.split, held_out.name, held_out.split) == ("all", "train_sft", "all", "test_sft")
    assert made["eval_batch_size"] == 8
    assert ours(tmp_path, **keys)["test_datasets"] == ()  # TRL takes no test rows unless it evaluates


def test_a_mixture_of_alignment_handbook_is_read_with_its_columns_and_its_held_out_share(tmp_path: Path) -> None:
    mixture = {
        "datasets": [
            {"id": "org/a", "config": "default", "split": "train_sft", "columns": ["messages"], "weight": 1.0},
            {"id": "org/b", "config": "en", "columns": ["messages"]},
        ],
        "seed": 0,
        "test_split_size": 100,
    }
    made = ours(tmp_path, dataset_name=..., dataset_mixture=mixture, eval_strategy="epoch")
    assert [(e.path, e.name, e.split, e.type) for e in made["datasets"]] == [
        ("org/a", None, "train_sft", "chat_template"),
        ("org/b", "en", "train", "chat_template"),
    ]
    assert made["val_set_size"] == 100
    assert "are not at hand" not in remarks(converted(tmp_path, dataset_name=..., dataset_mixture=mixture))
    mixture["datasets"][0]["weight"] = 0.5
    assert "a share of a dataset's rows (0.5 of 'org/a')" in refusal(
        tmp_path, dataset_name=..., dataset_mixture=mixture
    )


def test_a_mixture_of_trl_has_shares_of_the_largest_mixture_that_repeats_no_row(tmp_path: Path) -> None:
    entries = [{"path": "org/a", "fraction": 0.7, "columns": ["text"]}, {"path": "org/b", "fraction": 0.3}]
    made = ours(tmp_path, dataset_name=..., datasets=entries, dataset_text_field="text")
    assert [(e.path, e.weight, e.type) for e in made["datasets"]] == [
        ("org/a", 0.7, "completion"),
        ("org/b", 0.3, "completion"),
    ]


def test_the_older_mixer_takes_splits_by_their_names(tmp_path: Path) -> None:
    keys = {"dataset_mixer": {"org/a": 1.0, "org/b": 1.0}, "dataset_splits": ["train_sft", "test_sft"]}
    made = ours(tmp_path, dataset_name=..., eval_strategy="steps", eval_steps=10, **keys)
    assert [(e.path, e.split) for e in made["datasets"]] == [("org/a", "train_sft"), ("org/b", "train_sft")]
    assert [(e.path, e.split) for e in made["test_datasets"]] == [("org/a", "test_sft"), ("org/b", "test_sft")]


# template, length and packing


def test_a_template_in_the_recipe_is_the_template_of_the_converted_one(tmp_path: Path) -> None:
    text = "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}\n{% endfor %}"
    made = ours(tmp_path, chat_template=text)
    assert (made["chat_template"], made["chat_template_jinja"]) == ("jinja", text)
    assert "not the text of a template" in refusal(tmp_path, chat_template="chatml")


def test_a_template_in_a_file_is_named_and_another_tokenizers_is_refused_with_what_to_write(tmp_path: Path) -> None:
    made = ours(tmp_path, chat_template_path="my.jinja")
    assert (made["chat_template"], made["chat_template_jinja"]) == ("jinja", "my.jinja")
    assert "eos_token" in refusal(tmp_path, chat_template_path="org/other")


def test_tokens_with_a_role_are_special_tokens(tmp_path: Path) -> None:
    tokens = ours(tmp_path, eos_token="<|im_end|>", pad_token="<pad>")["special_tokens"]
    assert (tokens.eos_token, tokens.pad_token) == ("<|im_end|>", "<pad>")


@pytest.mark.parametrize(
    ("keys", "excess"),
    [
        ({"packing": True}, "truncate"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "split"),
        ({"packing_strategy": "wrapped"}, "truncate"),
    ],
)
def test_long_rows_are_cut_or_split_as_trl_does(tmp_path: Path, keys: dict[str, Any], excess: str) -> None:
    assert ours(tmp_path, **keys)["excess_length_strategy"] == excess


def test_packs_that_cut_rows_and_rows_of_any_length_are_refused(tmp_path: Path) -> None:
    assert "Write bfd" in refusal(tmp_path, packing=True, packing_strategy="wrapped")
    assert "means rows of any length" in refusal(tmp_path, max_length=None)
    assert "keeping the end of a long row" in refusal(tmp_path, truncation_mode="keep_end")


# adapter and number formats


def test_keys_of_an_adapter_that_is_not_used_are_left_out_with_a_note(tmp_path: Path) -> None:
    result = converted(tmp_path, use_peft=False, lora_r=8, lora_alpha=16)
    assert "use_peft is not true, so every weight is trained" in remarks(result)
    assert ours(tmp_path, use_peft=False, lora_r=8)["adapter"] is None


def test_named_layers_are_the_layers_that_are_adapted(tmp_path: Path) -> None:
    made = ours(tmp_path, use_peft=True, lora_target_modules=["q_proj", "o_proj"], lora_alpha=8, use_dora=True)
    assert (made["lora_target_modules"], made["lora_alpha"]) == (("q_proj", "o_proj"), 8)
    assert made["peft_use_dora"]
    assert ours(tmp_path, use_peft=True, lora_target_modules="all-linear")["lora_target_modules"] == "all-linear"


def test_a_base_in_four_bits_is_quantized_as_trl_quantizes_it(tmp_path: Path) -> None:
    made = ours(tmp_path, use_peft=True, load_in_4bit=True, torch_dtype="bfloat16")
    block = made["bnb_config_kwargs"]
    assert made["adapter"] == "qlora"
    assert (block.bnb_4bit_use_double_quant, block.bnb_4bit_compute_dtype) == (False, "bfloat16")
    block = ours(tmp_path, use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True, bnb_4bit_quant_type="fp4")
    assert block["bnb_config_kwargs"].bnb_4bit_use_double_quant is True
    assert block["bnb_config_kwargs"].bnb_4bit_quant_type == "fp4"
    assert "Write `use_peft: true`" in refusal(tmp_path, load_in_4bit=True)


def test_weights_in_sixteen_bits_are_said_to_be_trained_in_thirty_two(tmp_path: Path) -> None:
    assert "trained weights are always fp32 here" in remarks(converted(tmp_path, torch_dtype="bfloat16"))
    assert ours(tmp_path, dtype="bfloat16", bf16=False)["bf16"] is True  # it computes in bf16 without autocast
    assert ours(tmp_path, fp16=True)["bf16"] == "auto"


# schedule, times, uploads, trackers


def test_a_constant_rate_has_no_warmup_in_transformers(tmp_path: Path) -> None:
    made = ours(tmp_path, lr_scheduler_type="constant", warmup_steps=10)
    assert (made["lr_scheduler"], made["warmup_steps"]) == ("constant", None)
    made = ours(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=10)
    assert (made["lr_scheduler"], made["warmup_steps"]) == ("constant", 10)


def test_steps_of_warmup_stand_above_the_ratio_and_below_one_they_are_a_ratio(tmp_path: Path) -> None:
    assert ours(tmp_path, warmup_steps=10, warmup_ratio=0.1)["warmup_ratio"] is None
    assert ours(tmp_path, warmup_steps=0, warmup_ratio=0.1)["warmup_ratio"] == 0.1
    assert ours(tmp_path, warmup_steps=0.2)["warmup_ratio"] == 0.2


def test_a_number_of_steps_is_kept_and_minus_one_is_none(tmp_path: Path) -> None:
    assert ours(tmp_path, max_steps=50)["max_steps"] == 50
    made = ours(tmp_path, max_steps=-1, num_train_epochs=2)
    assert (made["max_steps"], made["num_epochs"]) == (None, 2)


def test_evaluations_are_as_often_as_logs_unless_their_steps_are_said(tmp_path: Path) -> None:
    assert ours(tmp_path, eval_strategy="steps", logging_steps=25)["eval_steps"] == 25
    assert ours(tmp_path, eval_strategy="steps", eval_steps=40, logging_steps=25)["eval_steps"] == 40
    assert ours(tmp_path, eval_strategy="epoch", eval_steps=40)["eval_steps"] is None
    assert ours(tmp_path, save_strategy="epoch", save_steps=40)["save_steps"] is None


def test_nothing_is_uploaded_unless_push_to_hub_says_so(tmp_path: Path) -> None:
    result = converted(tmp_path, hub_model_id="me/model", hub_strategy="every_save")
    assert "hub_model_id without effect: push_to_hub is not true" in remarks(result)
    assert ours(tmp_path, hub_model_id="me/model")["hub_model_id"] is None
    made = ours(tmp_path, push_to_hub=True, output_dir="data/my-model", hub_strategy="end")
    assert (made["hub_model_id"], made["hub_private_repo"]) == ("my-model", True)
    assert "hub_private_repo: false" in remarks(
        converted(tmp_path, push_to_hub=True, output_dir="a", hub_strategy="end")
    )


def test_an_upload_is_at_each_save_unless_another_time_is_said(tmp_path: Path) -> None:
    assert ours(tmp_path, push_to_hub=True, hub_model_id="me/x")["hub_strategy"] == "every_save"


def test_trackers_are_named_by_a_text_or_a_list(tmp_path: Path) -> None:
    made = ours(tmp_path, report_to="tensorboard")
    assert made["use_tensorboard"]
    made = ours(tmp_path, report_to=["wandb", "mlflow", "trackio"], run_name="seven")
    assert (made["use_wandb"], made["wandb_project"], made["wandb_name"]) == (True, "huggingface", "seven")
    assert (made["use_mlflow"], made["mlflow_run_name"], made["trackio_run_name"]) == (True, "seven", "seven")
    for nothing in ("none", ["none"], [], None):
        assert ours(tmp_path, report_to=nothing)["use_wandb"] is None
    assert "Name them: wandb" in refusal(tmp_path, report_to="all")
    assert "this tracker" in refusal(tmp_path, report_to=["comet_ml"])


def test_a_tracker_that_report_to_does_not_name_is_not_switched_on_by_its_keys(tmp_path: Path) -> None:
    keys = {"wandb_project": "p", "wandb_entity": "us", "logging_dir": "logs", "trackio_space_id": "me/space"}
    made = ours(tmp_path, **keys)
    assert [made[key] for key in keys] == [None] * 4
    assert "report_to does not name wandb" in remarks(converted(tmp_path, **keys))
    made = ours(tmp_path, **keys, report_to=["wandb", "tensorboard", "trackio"])
    assert [made[key] for key in keys] == [*keys.values()]


def test_options_of_the_schedule_may_be_json_and_kernels_of_flash_attention_are_flash_attention(tmp_path: Path) -> None:
    keys = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}
    assert ours(tmp_path, **keys)["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert ours(tmp_path, attn_implementation="kernels-community/flash-attn2")["attn_implementation"] == "auto"


@pytest.mark.parametrize("key", ["use_peft", "assistant_only_loss", "packing", "push_to_hub", "load_in_4bit"])
def test_a_switch_that_is_neither_true_nor_false_is_not_dropped(tmp_path: Path, key: str) -> None:
    for word in ("yes", 1):
        assert f"{key} is " in refusal(tmp_path, **{key: word})
        assert "must be true or false" in refusal(tmp_path, **{key: word})


def test_dft_weighs_tokens_by_their_probability(tmp_path: Path) -> None:
    assert ours(tmp_path, loss_type="dft")["loss_weighting"] == "probability"
    assert "without their weights; TRL's has them" in remarks(converted(tmp_path, loss_type="dft"))
    assert ours(tmp_path, loss_type="nll")["loss_weighting"] is None


def test_an_earlier_run_is_not_deleted_for_a_key_that_deletes_nothing_there(tmp_path: Path) -> None:
    assert ours(tmp_path, overwrite_output_dir=True)["overwrite_output_dir"] is False
    assert "would delete an earlier run" in remarks(converted(tmp_path, overwrite_output_dir=True))


@pytest.mark.parametrize(
    "keys",
    [
        {"beta": 0.1, "loss_type": "sigmoid", "max_prompt_length": 512},
        {"loss_type": "apo_zero"},
        {"reward_funcs": ["accuracy"], "num_generations": 16, "use_vllm": True},
        {"desirable_weight": 1.0},
    ],
)
def test_preference_learning_and_its_losses_are_refused_by_name(tmp_path: Path, keys: dict[str, Any]) -> None:
    message = refusal(tmp_path, **keys)
    assert "unknown key" not in message
    assert "preference" in message
    assert message.count("is not supported yet") == len(keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_revision": "v2"}, "a revision of the model"),
        ({"dataloader_drop_last": True}, "dropping an epoch's last rows"),
        ({"average_tokens_across_devices": False}, "a mean of the ranks' means"),
        ({"train_sampling_strategy": "sequential"}, "rows in the order of the file"),
        ({"use_peft": True, "lora_task_type": "SEQ_CLS"}, "adapters of other tasks"),
        ({"benchmarks": ["gpqa"]}, "benchmarks after training"),
        ({"push_to_hub_revision": True}, "an upload to a branch"),
        ({"resume_from_checkpoint": "out/checkpoint-5"}, "another tool's checkpoint"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "arguments of from_pretrained"),
        ({"dataset_kwargs": {"append_concat_token": True}}, "append_concat_token is not supported"),
    ],
)
def test_what_would_train_something_else_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    assert says in refusal(tmp_path, **keys)


# tools


@pytest.mark.parametrize(
    ("values", "tool"),
    [
        ({**BASE}, TRL_TOOL),
        ({"model_name_or_path": "m", "datasets": [{"path": "a"}]}, TRL_TOOL),
        ({"dataset_name": "d", "learning_rate": 1e-4}, TRL_TOOL),
        ({"model_name_or_path": "m", "stage": "sft", "dataset": "identity"}, LLAMA_FACTORY_TOOL),
        ({"model_name_or_path": "m", "template": "llama3", "cutoff_len": 9}, LLAMA_FACTORY_TOOL),
        ({"base_model": "m", "datasets": [], "lora_r": 8}, AXOLOTL_TOOL),
        ({"learning_rate": 1e-4, "lora_r": 8, "dataset_num_proc": 2}, AXOLOTL_TOOL),
    ],
)
def test_a_tool_is_known_by_its_keys(values: dict[str, Any], tool: Any) -> None:
    assert tool_of(values) is tool


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model": {"_component_": "torchtune.models.llama3.llama3_8b"}, "batch_size": 2}, "torchtune"),
        ({"model": "mlx-community/m", "train": True, "iters": 600, "data": "d"}, "mlx-lm"),
        ({"checkpoint_dir": "c", "precision": "bf16-true", "data": {"class_path": "litgpt.data.JSON"}}, "LitGPT"),
        ({"model": {"model_name": "m"}, "data": {"train": {}}, "training": {"trainer_type": "TRL_SFT"}}, "Oumi"),
    ],
)
def test_a_recipe_of_a_tool_that_is_not_read_is_refused_with_the_tools_name(
    tmp_path: Path, values: dict[str, Any], name: str
) -> None:
    path = write(tmp_path, values)
    for read in (load, convert):
        with pytest.raises(RecipeError, match=f"recipe of {name}, which is not read here"):
            read(path)


# parity


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("parity_trl", ROOT / "benchmarks" / "parity_trl.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORDED = json.loads(Path(__file__).with_name("trl_rows.json").read_text())
MORE_CASES = ("lora", "lora_rslora_named", "cosine_warmup_decay", "constant_with_ignored_warmup")
CASE_NAMES = [*(name for name in RECORDED if name != "version"), *MORE_CASES]
RECORDED_CASES = [pytest.param(name) if name == "chat_pairs" else name for name in RECORDED if name != "version"]


@pytest.mark.parametrize("name", RECORDED_CASES)
def test_a_conversion_makes_the_tokens_and_labels_that_trl_made(name: str, tmp_path: Path) -> None:
    """RECORDED: by benchmarks/parity_trl.py --record, with the TRL that it names."""
    parity = benchmark()
    recipe = parity.write_case(tmp_path, parity.CASES[name], steps=3)
    (tmp_path / "ours.yml").write_text(convert(recipe, first_row=first_row_at_hand).text)
    made = parity.our_rows(tmp_path / "ours.yml")[: len(RECORDED[name])]
    assert [*map(parity.learned, made)] == [*map(parity.learned, RECORDED[name])]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*CASE_NAMES, "dft"])  # whose rows are those of a case that is recorded
def test_three_steps_by_trl_and_by_its_conversion_have_the_same_losses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = os.environ.get("TRL_PYTHON")
    if python is None:
        pytest.skip("needs the Python of an environment with trl 1.16: TRL_PYTHON=/path/to/bin/python")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    compared = benchmark().compare(name, python, tmp_path)
    assert compared.differing_rows == []
    assert compared.worst < 1e-4
