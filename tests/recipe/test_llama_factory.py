"""A recipe of LLaMA-Factory becomes one that trains the same, or is refused with what to write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.data.first_row import first_row_at_hand
from finetuner.errors import RecipeError
from finetuner.recipe import KEYS, load
from finetuner.recipe.convert import Converted, convert
from finetuner.recipe.foreign.llama_factory import TAKEN_TOGETHER
from finetuner.recipe.foreign.llama_factory_templates import TEMPLATES, WITHOUT_AN_END
from finetuner.recipe.foreign.tools import LLAMA_FACTORY_TOOL
from finetuner.recipe.schema import Recipe

BARE = "model_name_or_path: org/model\nstage: sft\ndo_train: true\ndataset: team\ntemplate: chatml\noutput_dir: out\n"

# hiyouga/LLaMA-Factory 0.9.5, src/llamafactory/hparams (with transformers 5.6): what holds when nothing is said.
DEFAULTS: dict[str, Any] = {
    "adapter.adapter": "lora",  # finetuning_type
    "adapter.lora_r": 8,  # lora_rank
    "adapter.lora_alpha": 16,  # twice lora_rank
    "adapter.lora_dropout": 0.0,
    "adapter.lora_target_linear": True,  # lora_target: all
    "adapter.peft_use_rslora": False,
    "adapter.peft_use_dora": False,
    "quantization.bnb_config_kwargs.bnb_4bit_quant_type": "nf4",
    "quantization.bnb_config_kwargs.bnb_4bit_use_double_quant": True,
    "data.sequence_len": 2048,  # cutoff_len
    "data.excess_length_strategy": "truncate",
    "data.train_on_inputs": False,  # train_on_prompt
    "data.val_set_size": 0.0,
    "data.streaming": False,
    "packing.sample_packing": False,
    "packing.group_by_length": False,
    "batch.micro_batch_size": 8,
    "batch.gradient_accumulation_steps": 1,
    "schedule.num_epochs": 3.0,
    "schedule.max_steps": None,
    "schedule.learning_rate": 5e-5,
    "schedule.lr_scheduler": "linear",
    "schedule.warmup_steps": None,
    "optimizer.weight_decay": 0.0,
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.999,
    "optimizer.adam_epsilon": 1e-8,
    "optimizer.max_grad_norm": 1.0,
    "regularization.label_smoothing_factor": 0.0,
    "precision.bf16": False,
    "precision.fp16": False,
    "precision.gradient_checkpointing": True,  # disable_gradient_checkpointing is false
    "output.save_steps": 500,
    "output.save_total_limit": 0,  # all are kept
    "output.save_only_model": False,
    "output.logging_steps": 500,
    "output.seed": 42,
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that LLaMA-Factory is run from."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


Listing = Callable[..., None]


@pytest.fixture
def listing(here: Path) -> Listing:
    """listing(team={...}) writes data/dataset_info.json."""

    def write(folder: str = "data", **datasets: Any) -> None:
        (here / folder).mkdir(exist_ok=True)
        (here / folder / "dataset_info.json").write_text(json.dumps(datasets))

    return write


def converted(text: str) -> tuple[Converted, Recipe]:
    Path("lf.yml").write_text(text)
    result = convert("lf.yml", first_row=first_row_at_hand)
    Path("ours.yml").write_text(result.text)
    return result, load("ours.yml", check_files=False).recipe


def refusal(text: str) -> str:
    Path("lf.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        convert("lf.yml", first_row=first_row_at_hand)
    return str(caught.value)


def value_of(recipe: Any, path: str) -> Any:
    for name in path.split("."):
        recipe = getattr(recipe, name)
    return recipe


def entry_of(recipe: Recipe) -> dict[str, Any]:
    return recipe.data.datasets[0].model_dump(exclude_unset=True)


def remarks(result: Converted) -> str:
    return "\n".join(str(note) for note in result.notes if not note.quiet)


def test_what_holds_when_nothing_is_said_is_llama_factorys_default(here: Path) -> None:
    _, recipe = converted(BARE)
    assert {path: value_of(recipe, path) for path in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("said", "alpha"),
    [("", 16), ("lora_rank: 64\n", 128), ("lora_rank: 64\nlora_alpha: 16\n", 16), ("lora_alpha: null\n", 16)],
)
def test_lora_alpha_is_twice_the_rank_unless_it_is_given(here: Path, said: str, alpha: int) -> None:
    assert converted(BARE + said)[1].adapter.lora_alpha == alpha


@pytest.mark.parametrize(
    ("said", "adapter"),
    [("", "lora"), ("finetuning_type: full\n", None), ("quantization_bit: 4\n", "qlora"),
     ("finetuning_type: lora\nquantization_bit: 4\n", "qlora"),
     ("quantization_bit: 4\nfinetuning_type: lora\n", "qlora")],
)  # fmt: skip
def test_lora_is_what_it_trains_unless_it_is_told_otherwise(here: Path, said: str, adapter: str | None) -> None:
    assert converted(BARE + said)[1].adapter.adapter == adapter


def test_formats_of_a_quantized_base_are_taken_over(here: Path) -> None:
    text = BARE + "quantization_bit: 4\nquantization_type: fp4\ndouble_quantization: false\n"
    formats = converted(text)[1].quantization.bnb_config_kwargs
    assert (formats.bnb_4bit_quant_type, formats.bnb_4bit_use_double_quant) == ("fp4", False)
    assert converted(BARE + "quantization_bit: 8\n")[1].quantization.load_in_8bit


@pytest.mark.parametrize(
    ("info", "entry"),
    [
        ({"file_name": "a.json"},
         {"path": "data/a.json", "type": "instruction_chat",
          "instruction_columns": {"system": "", "history": "", "tools": ""}}),
        ({"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "system": "sys", "history": "past"}},
         {"path": "data/a.json", "type": "instruction_chat",
          "instruction_columns": {"instruction": "q", "input": "", "output": "a", "system": "sys", "history": "past",
                                  "tools": ""}}),
        ({"file_name": "rows", "formatting": "sharegpt"},
         {"path": "./data/rows", "type": "chat_template", "field_messages": "conversations",
          "message_property_mappings": {"role": "from", "content": "value"}}),
        ({"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages", "tools": "functions"},
          "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "customer", "assistant_tag": "agent"}},
         {"path": "data/a.jsonl", "type": "chat_template", "field_tools": "functions",
          "roles": {"user": ("customer",), "assistant": ("agent",)}}),
        ({"hf_hub_url": "org/rows", "ms_hub_url": "x/y", "subset": "en", "split": "train_sft", "folder": "part"},
         {"path": "org/rows", "name": "en", "split": "train_sft", "data_files": "part/*", "type": "instruction_chat",
          "instruction_columns": {"system": "", "history": "", "tools": ""}}),
        ({"file_name": "a.jsonl", "formatting": "openai", "columns": {"messages": "messages"},
          "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                   "observation_tag": "tool", "function_tag": "function", "system_tag": "system"}},
         {"path": "data/a.jsonl", "type": "chat_template"}),
    ],
)  # fmt: skip
def test_a_dataset_is_what_dataset_info_says_it_is(listing: Listing, info, entry) -> None:
    listing(team=info)
    assert entry_of(converted(BARE)[1]) == entry | {"unused_columns": "ignore"}


def test_datasets_lie_in_dataset_dir_and_max_samples_holds_for_each(listing: Listing) -> None:
    listing("rows", one={"file_name": "1.json"}, two={"file_name": "2.json"})
    text = BARE.replace("dataset: team", "dataset: one, two\ndataset_dir: rows\nmax_samples: 7\neval_dataset: two")
    data = converted(text)[1].data
    assert [(entry.path, entry.max_samples) for entry in data.datasets] == [("rows/1.json", 7), ("rows/2.json", 7)]
    assert [(entry.path, entry.max_samples) for entry in data.test_datasets] == [("rows/2.json", 7)]


def test_without_dataset_info_it_is_said_which_file_was_looked_for_and_what_is_assumed(here: Path) -> None:
    result, recipe = converted(BARE + "dataset_dir: team_data\n")
    assert entry_of(recipe) == {"path": "team_data/team.json", "type": "instruction_chat"}  # all its columns are read
    assert "team_data/dataset_info.json is not here" in remarks(result)
    assert "Assumed: team_data/team.json" in result.text


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"file_name": "a.json", "ranking": True}, "preference learning"),
        ({"file_name": "a.json", "columns": {"prompt": "q", "kto_tag": "good"}}, "preference learning"),
        ({"file_name": "a.json", "columns": {"messages": "m", "images": "images"}}, "rows with images"),
        ({"file_name": "a.json", "num_samples": 10}, "num_samples takes 10 rows by chance"),
        ({"ms_hub_url": "x/y"}, "ModelScope's"),
        ({"script_url": "x.py"}, "Python script"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": {"role_tag": "r", "content_tag": "c",
          "function_tag": "call"}}, "the role 'call' for tool calls"),
        ({"file_name": "a.json", "columns": {"prompt": "q"}}, "name no response"),
        ({"file_name": "a.json", "columns": ["q"]}, "are no names"),
        ({}, "names no place"),
    ],
)  # fmt: skip
def test_a_dataset_that_cannot_be_read_as_it_is_meant_is_refused(listing: Listing, info, said: str) -> None:
    listing(team=info)
    assert said in refusal(BARE)


def test_a_dataset_that_is_not_listed_is_refused_with_the_nearest_name(listing: Listing) -> None:
    listing(teams={"file_name": "a.json"})
    assert "'team' is not in data/dataset_info.json. Did you mean 'teams'?" in refusal(BARE)


def test_a_column_that_dataset_info_does_not_name_is_spoken_of(listing: Listing, here: Path) -> None:
    listing(team={"file_name": "a.jsonl", "formatting": "sharegpt"})
    (here / "data" / "a.jsonl").write_text('{"conversations": [], "tools": "[]"}\n')
    assert "have a column `tools`, which dataset_info.json does not name" in remarks(converted(BARE)[0])


def test_interleaved_datasets_have_weights(listing: Listing) -> None:
    listing(one={"file_name": "1.json"}, two={"file_name": "2.json"})
    text = BARE.replace("team", "one,two") + "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3\n"
    assert [entry.weight for entry in converted(text)[1].data.datasets] == [0.7, 0.3]
    assert "interleave_over repeats rows" in refusal(text.replace("_under", "_over"))


def test_plain_text_is_packed_and_each_token_sees_its_whole_row(listing: Listing) -> None:
    listing(team={"file_name": "a.jsonl", "columns": {"prompt": "text"}})
    result, recipe = converted(BARE.replace("stage: sft", "stage: pt"))
    assert entry_of(recipe) == {"path": "data/a.jsonl", "type": "completion"}
    assert recipe.packing.sample_packing and not recipe.packing.pretrain_multipack_attn
    assert recipe.data.excess_length_strategy == "split" and recipe.data.chat_template is None
    assert "LLaMA-Factory joins all texts" in remarks(result)
    _, unpacked = converted(BARE.replace("stage: sft", "stage: pt\npacking: false"))
    assert (unpacked.packing.sample_packing, unpacked.data.excess_length_strategy) == (False, "truncate")


@pytest.mark.parametrize(
    ("said", "packs", "is_told"),
    [("packing: true\n", True, True), ("neat_packing: true\n", True, False),
     ("packing: true\nneat_packing: true\n", True, False), ("packing: false\n", False, False)],
)  # fmt: skip
def test_packs_are_isolated_and_it_is_said_where_llama_factorys_are_not(here: Path, said, packs, is_told) -> None:
    result, recipe = converted(BARE + said)
    assert recipe.packing.sample_packing == packs
    assert ("do not see each other here" in remarks(result)) == is_told


@pytest.mark.parametrize("name", [*WITHOUT_AN_END, "no_such"])
def test_a_template_that_cannot_be_written_is_refused_with_what_to_write(here: Path, name: str) -> None:
    said = refusal(BARE.replace("chatml", name))
    assert f"template: '{name}' is not supported yet" in said and "`chat_template: tokenizer_default`" in said
    _, recipe = converted(BARE.replace("template: chatml", "chat_template: tokenizer_default"))
    assert recipe.data.chat_template == "tokenizer_default"


def test_a_template_without_a_name_is_the_tokenizers_own(here: Path) -> None:
    result, recipe = converted(BARE.replace("template: chatml\n", "") + "mask_history: true\n")
    assert recipe.data.chat_template == "tokenizer_default"
    assert entry_of(recipe)["train_on_last_turn"] is True
    assert "no template is named" in remarks(result)


def test_the_token_that_ends_a_templates_answers_is_the_tokenizers_end(here: Path) -> None:
    assert converted(BARE)[1].tokenizer.special_tokens.eos_token == "<|im_end|>"
    assert converted(BARE.replace("chatml", "vicuna"))[1].tokenizer.special_tokens.eos_token is None


@pytest.mark.parametrize(
    ("said", "capability"),
    [
        ("stage: dpo", "preference and reinforcement learning"), ("use_asft_loss: true", "the ASFT loss"),
        ("use_galore: true", "GaLore"), ("use_apollo: true", "APOLLO"), ("use_badam: true", "BAdam"),
        ("use_adam_mini: true", "Adam-mini"), ("pissa_init: true", "PiSSA"), ("use_llama_pro: true", "LLaMA Pro"),
        ("finetuning_type: freeze", "unfrozen_parameters"), ("finetuning_type: oft", "'oft' is not supported yet"),
        ("quantization_bit: 3", "Write 4 or 8"), ("quantization_method: hqq", "without bitsandbytes"),
        ("shift_attn: true", "LongLoRA"), ("pure_bf16: true", "trained weights stay fp32"),
        ("disable_shuffling: true", "rows in the order of the file"), ("use_kt: true", "KTransformers"),
        ("adapter_name_or_path: a,b", "Merge them into the model first"), ("fp8: true", "8-bit floats"),
        ("adapter_name_or_path: a\ncreate_new_adapter: true", "Merge them into the model first"),
        ("predict_with_generate: true", "generating during evaluation"), ("use_unsloth: true", "Unsloth"),
        ("mask_history: true\ntrain_on_prompt: true", "contradict each other"),
        ("default_system: 3.5", "default_system must be text"),
        ("mask_history: yes", "mask_history is the text 'yes', but must be true or false"),
        ("use_dft_loss: 1", "use_dft_loss is 1, but must be true or false"),
        ("tensor_model_parallel_size: 2", "Megatron"), ("train_from_scratch: true", "from-scratch"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named_as_what_it_is(here: Path, said: str, capability: str) -> None:
    text = BARE.replace("stage: sft\n", "") if said.startswith("stage") else BARE
    assert capability in refusal(text + said + "\n")


def test_the_size_of_muons_steps_is_llama_factorys(here: Path) -> None:
    optimizer = converted(BARE + "finetuning_type: full\nuse_muon: true\n")[1].optimizer
    assert (optimizer.optimizer, optimizer.optim_args) == ("muon", {"adjust_lr_fn": "match_rms_adamw"})


@pytest.mark.parametrize(
    ("said", "strategy"),
    [("val_size: 0.1\n", "no"), ("val_size: 0.1\neval_strategy: steps\neval_steps: 50\n", "steps"),
     ("val_size: 0.1\neval_steps: 50\n", "no")],
)  # fmt: skip
def test_held_out_rows_are_looked_at_when_llama_factory_would(here: Path, said: str, strategy: str) -> None:
    evaluation = converted(BARE + said)[1].evaluation
    assert evaluation.eval_strategy == strategy
    assert evaluation.eval_steps == (50 if strategy == "steps" else None)


def test_new_tokens_of_both_kinds_are_added(here: Path) -> None:
    _, recipe = converted(BARE + "add_tokens: <a>, <b>\nadd_special_tokens: <c>\nresize_vocab: true\n")
    assert recipe.tokenizer.tokens == ("<a>", "<b>", "<c>")


def test_a_recipe_of_the_v1_engine_is_named_as_one(here: Path) -> None:
    assert "LLaMA-Factory's v1 engine" in refusal("model: Qwen/Qwen3-4B\ntrain_dataset: data/v1.yaml\n")


def test_every_key_of_its_hparams_is_known() -> None:
    known = set(LLAMA_FACTORY_TOOL.meanings) | set(KEYS) | set(TAKEN_TOGETHER)
    for names in HPARAMS.values():
        assert sorted(set(names.split()) - known) == []


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_no_listing_of_datasets_leads_to_a_traceback(data, tmp_path_factory) -> None:
    simple = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
    values = simple | st.dictionaries(
        st.sampled_from(["prompt", "response", "messages", "role_tag", "content_tag"]), simple, max_size=4
    )
    keys = ["file_name", "hf_hub_url", "formatting", "columns", "tags", "split", "ranking", "num_samples", "folder"]
    info = data.draw(st.dictionaries(st.sampled_from(keys), values, max_size=6))
    folder = tmp_path_factory.mktemp("listing")
    (folder / "dataset_info.json").write_text(json.dumps({"team": info}))
    (folder / "lf.yml").write_text(BARE + f"dataset_dir: {folder}\n")
    try:
        convert(folder / "lf.yml", first_row=first_row_at_hand)
    except RecipeError as error:
        assert str(error)


def test_every_template_is_a_chat_template_that_compiles() -> None:
    from finetuner.data.template_sandbox import compile_template
    from finetuner.recipe.foreign.llama_factory_chat import chat_template
    from finetuner.recipe.foreign.llama_factory_templates import Settings

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for name, template in TEMPLATES.items():
        compiled = compile_template(chat_template(template, Settings()), {"bos_token": "<s>", "eos_token": "</s>"})
        text, ((start, stop),) = compiled.render_marked(chat, None)
        assert "Yes" in text[start:stop] and "Hi" not in text[start:stop], name


# Names of all fields: LLaMA-Factory 0.9.5 with transformers 5.6.
HPARAMS = {
    "DataArguments": """
        template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history streaming
        buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size
        preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss val_size
        eval_on_each_dataset packing neat_packing tool_format default_system enable_thinking preserve_thinking
        tokenized_path data_shared_file_system
    """,
    "FinetuningArguments": """
        freeze_trainable_layers freeze_trainable_modules freeze_extra_modules additional_target module_dropout
        oft_rank oft_block_size oft_target create_new_adapter lora_alpha lora_dropout lora_rank lora_target
        loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
        simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model
        ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
        reward_model_quantization_bit reward_model_type ld_alpha use_galore galore_target galore_rank
        galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo apollo_target
        apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type
        apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode
        badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_swanlab swanlab_project
        swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir
        swanlab_lark_webhook_url swanlab_lark_secret pure_bf16 stage finetuning_type use_llama_pro
        use_adam_mini use_mca use_hyper_parallel hyper_parallel_args use_muon use_dft_loss use_asft_loss
        asft_alpha use_eaft_loss eaft_alpha freeze_vision_tower freeze_multi_modal_projector
        freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss
        include_effective_tokens_per_second
    """,
    "GeneratingArguments": """
        do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty
        length_penalty skip_special_tokens
    """,
    "ModelArguments": """
        model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
        split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens
        model_revision low_cpu_mem_usage rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth
        use_unsloth_gc enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing use_reentrant_gc
        upcast_layernorm upcast_lmhead_output train_from_scratch infer_backend offload_folder use_kv_cache
        use_v1_kernels infer_dtype hf_hub_token ms_hub_token om_hub_token print_param_status trust_remote_code
        quantization_method quantization_bit quantization_type double_quantization quantization_device_map
        image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels
        video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate export_dir export_size
        export_device export_quantization_bit export_quantization_dataset export_quantization_nsamples
        export_quantization_maxlen export_legacy_format export_hub_model_id use_kt kt_weight_path
        kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size
        vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen
        sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend
    """,
    "TrainingArguments": """
        output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
        optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
        label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 gradient_checkpointing
        gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
        liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
        include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
        trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
        save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
        hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
        parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor remove_unused_columns label_names
        train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
        skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint warmup_ratio logging_dir
        local_rank sortish_sampler predict_with_generate generation_max_length generation_num_beams
        generation_config ray_num_workers ray_init_kwargs master_addr master_port fp8 fp8_backend
        fp8_enable_fsdp_float8_all_gather enable_torch_profiler profiler_output_dir profiler_wait_steps
        profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes
        profiler_profile_memory profiler_with_stack profile_modules overwrite_output_dir
    """,
}


def test_the_tokens_that_a_loss_is_divided_by_are_spoken_of_where_they_differ(here: Path) -> None:
    assert "first token of each row" in remarks(converted(BARE + "train_on_prompt: true\n")[0])
    assert "first token of each row" not in remarks(converted(BARE)[0])
