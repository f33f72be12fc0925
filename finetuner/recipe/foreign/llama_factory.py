"""LLaMA-Factory's keys, each by itself, and its defaults where ours are others.

Names and defaults: hiyouga/LLaMA-Factory src/llamafactory/hparams 0.9.5. llama_factory_groups.py has the keys that mean
something only together. A test holds all names of its hparams against the two.
"""

from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, renamed, same, translated
from finetuner.recipe.foreign.trainers import TRAINING_ARGUMENTS, lora_target


def _flash_attn(kind: Any) -> Mapping[str, Any]:
    return {"attn_implementation": {"fa2": "flash_attention_2", "disabled": "eager"}.get(kind, kind)}


def _of_switch(keys: str, switch: str) -> dict[str, Foreign]:
    """Keys without effect, since the switch that they belong to is refused where it is on."""
    return same(keys, ignored(f"it belongs to {switch}, which is not on"))


# its Muon takes steps of the size of AdamW's, and this is PyTorch's word for that
_MUON = {"optimizer": "muon", "optim_args": {"adjust_lr_fn": "match_rms_adamw"}}
_GENERATION = "generating is a command of its own here: finetuner generate, finetuner evaluate"
_PROFILER = ignored("it belongs to enable_torch_profiler, which is not on")

_DATA: dict[str, Foreign] = {
    "cutoff_len": renamed("sequence_len"),
    "train_on_prompt": renamed("train_on_inputs"),
    "val_size": translated(lambda size: {"val_set_size": size} if size else {}),
    "buffer_size": translated(lambda rows: {"streaming_multipack_buffer_size": rows}),
    "tokenized_path": ignored("rows are tokenized anew, and cached below dataset_prepared_path", loud=True),
    "eval_on_each_dataset": blocked("a loss for each held-out dataset", "Remove it: all held-out rows count as one."),
    "ignore_pad_token_for_loss": Foreign(
        unsupported="learning padding", instead="Remove it: padding is never learned.", only_value=True
    ),
    **same(
        "preprocessing_batch_size preprocessing_num_workers overwrite_cache data_shared_file_system",
        ignored("rows are tokenized once, by as many processes as there are cores, and cached"),
    ),
}

_MODEL: dict[str, Foreign] = {
    "adapter_name_or_path": renamed("lora_model_dir"),
    "adapter_folder": blocked("an adapter in a folder of a repository", "Give the folder in adapter_name_or_path."),
    "cache_dir": blocked("a cache folder of its own", "Set HF_HOME in the environment."),
    "use_fast_tokenizer": ignored("the fast tokenizer is always used"),
    "resize_vocab": ignored("embeddings grow with the vocabulary"),
    "split_special_tokens": ignored("a row's words that look like special tokens are always words"),
    "new_special_tokens_config": blocked("tokens that begin as the mean of a description", "Write `tokens: [...]`."),
    "init_special_tokens": Foreign(
        unsupported="tokens that begin as the mean of a description", instead="Remove it.", says_nothing=("noise_init",)
    ),
    "model_revision": blocked("a revision of the model", "Give its folder.", says_nothing=("main",)),
    "rope_scaling": blocked("longer contexts by scaling RoPE", "Change the model's config.json."),
    "flash_attn": translated(_flash_attn),
    "shift_attn": blocked("shifted sparse attention (LongLoRA)"),
    "mixture_of_depths": blocked("mixture of depths"),
    "use_unsloth": blocked("Unsloth", "Remove it: its kernels have counterparts here that are always on."),
    "use_unsloth_gc": blocked("activations in host memory", "Remove it; gradient_checkpointing is on."),
    "enable_liger_kernel": AXOLOTL["liger_rms_norm"],
    "moe_aux_loss_coef": blocked("a loss that balances experts"),
    "disable_gradient_checkpointing": translated(lambda off: {"gradient_checkpointing": not off}),
    "use_reentrant_gc": ignored("how activations are computed again changes no number"),
    "upcast_layernorm": ignored("norms compute in fp32, and trained weights are fp32"),
    "upcast_lmhead_output": ignored("the loss is computed in fp32"),
    "train_from_scratch": blocked("random weights of a given model", "See `base_model: from-scratch`."),
    "use_kv_cache": ignored("training keeps no cache of keys and values"),
    "use_v1_kernels": ignored("kernels are chosen for the device"),
    "print_param_status": ignored("the run says how many weights are trained"),
    **same("hf_hub_token ms_hub_token om_hub_token", blocked("a token in a recipe", "Set HF_TOKEN, and remove it.")),
    "quantization_method": Foreign(
        unsupported="quantizing without bitsandbytes", instead="Write bnb.", says_nothing=("bnb", "bitsandbytes")
    ),
    "quantization_device_map": blocked("one rank's model on several devices"),
    **same("low_cpu_mem_usage offload_folder", ignored("weights are read shard by shard")),
    **same("infer_backend infer_dtype", ignored(_GENERATION)),
    **same(
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
        "video_fps video_maxlen use_audio_in_video audio_sampling_rate",
        ignored("rows are text; a dataset with pictures, video or sound is refused"),
    ),
    **same(
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
        blocked("exporting by a recipe", "Remove it: `finetuner merge` and `finetuner export` are commands."),
    ),
    "use_kt": blocked("KTransformers"),
    **_of_switch(
        "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size",
        "use_kt",
    ),
    **same(
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction "
        "sglang_tp_size sglang_config sglang_lora_backend",
        ignored(_GENERATION),
    ),
}

_METHOD: dict[str, Foreign] = {
    "stage": Foreign(
        unsupported="preference and reinforcement learning",
        instead="Only sft and pt can be run.",
        says_nothing=("sft",),
    ),
    "lora_rank": renamed("lora_r"),
    "lora_target": translated(lora_target),
    "additional_target": translated(lambda names: {"lora_modules_to_save": [n.strip() for n in names.split(",")]}),
    "use_rslora": renamed("peft_use_rslora"),
    "use_dora": renamed("peft_use_dora"),
    "loraplus_lr_embedding": blocked("a rate of LoRA's embeddings", "Write embedding_lr.", says_nothing=(1e-6,)),
    "pissa_init": blocked("PiSSA's start of LoRA", "Remove it."),
    **_of_switch("pissa_iter pissa_convert", "pissa_init"),
    "pure_bf16": blocked("training in pure bf16", "Write bf16: true; trained weights stay fp32."),
    **_of_switch("freeze_trainable_layers freeze_trainable_modules freeze_extra_modules", "finetuning_type: freeze"),
    **_of_switch("module_dropout oft_rank oft_block_size oft_target", "finetuning_type: oft"),
    "use_llama_pro": blocked("training expanded blocks alone (LLaMA Pro)"),
    "use_galore": blocked("the GaLore optimizer"),
    **_of_switch(
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise", "use_galore"
    ),
    "use_apollo": blocked("the APOLLO optimizer"),
    **_of_switch(
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type "
        "apollo_layerwise apollo_scale_front",
        "use_apollo",
    ),
    "use_badam": blocked("the BAdam optimizer"),
    **_of_switch(
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode "
        "badam_verbose",
        "use_badam",
    ),
    "use_adam_mini": blocked("the Adam-mini optimizer"),
    "use_muon": translated(lambda on: _MUON if on else {}),
    "use_asft_loss": blocked("the ASFT loss (DFT with a penalty for leaving the model)"),
    "asft_alpha": ignored("it belongs to use_asft_loss, which is not on"),
    "use_mca": blocked("training with Megatron"),
    "use_hyper_parallel": blocked("training with HyperParallel"),
    "hyper_parallel_args": ignored("it belongs to use_hyper_parallel, which is not on"),
    **same(
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size sequence_parallel "
        "context_parallel_size virtual_pipeline_model_parallel_size bias_activation_fusion apply_rope_fusion "
        "use_distributed_optimizer overlap_param_gather overlap_grad_reduce moe_grouped_gemm "
        "moe_token_dispatcher_type recompute_granularity",
        blocked("training with Megatron"),
    ),
    **same(
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
        ignored("a text model has no vision tower"),
    ),
    "freeze_language_model": blocked("training a vision tower alone"),
    "compute_accuracy": ignored("accuracy is not measured; the held-out loss is", loud=True),
    "disable_shuffling": blocked("rows in the order of the file", "Remove it: rows are shuffled by the seed."),
    "early_stopping_steps": renamed("early_stopping_patience"),
    **same("plot_loss include_effective_tokens_per_second", ignored("metrics.jsonl has every figure")),
    **same(
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
        "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
        "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type ld_alpha",
        blocked("preference and reinforcement learning"),
    ),
    "use_swanlab": blocked("the tracker SwanLab", "Remove it; metrics.jsonl has every figure."),
    **_of_switch(
        "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
        "use_swanlab",
    ),
}

_TRAINER: dict[str, Foreign] = {
    "predict_with_generate": blocked("generating during evaluation", "Remove it: finetuner evaluate is a command."),
    **same("sortish_sampler generation_config", blocked("generating during evaluation")),
    **same(
        "generation_max_length generation_num_beams eval_num_beams do_sample temperature top_p top_k num_beams "
        "max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens",
        ignored(_GENERATION),
    ),
    "ray_num_workers": ignored("start as many ranks with torchrun --nproc-per-node in the place of Ray", loud=True),
    **same("ray_init_kwargs ray_storage_path ray_run_name", ignored("it belongs to Ray, which starts nothing here")),
    **same("master_addr master_port", ignored("torchrun says where ranks meet")),
    "fsdp_transformer_layer_cls_to_wrap": ignored("FSDP wraps the model's decoder layers"),
    "fp8": blocked("training in 8-bit floats"),
    **_of_switch("fp8_backend fp8_enable_fsdp_float8_all_gather", "fp8"),
    "enable_torch_profiler": blocked("profiling"),
    **same(
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
        _PROFILER,
    ),
}

_OF_EARLIER_VERSIONS: dict[str, Foreign] = {
    "visual_inputs": blocked("pictures, video and sound"),
    **_of_switch("name_module_trainable num_layer_trainable", "finetuning_type: freeze"),
    "reserved_label_len": ignored("rows are cut at their end"),
    "use_fp8": blocked("training in 8-bit floats"),
}

LLAMA_FACTORY: dict[str, Foreign] = TRAINING_ARGUMENTS | _OF_EARLIER_VERSIONS | _DATA | _MODEL | _METHOD | _TRAINER

# Keys that llama_factory_groups.py takes before the table is read.
TAKEN_TOGETHER = (
    "dataset", "eval_dataset", "dataset_dir", "media_dir", "max_samples", "mix_strategy", "interleave_probs",
    "template", "default_system", "enable_thinking", "preserve_thinking", "tool_format", "mask_history", "packing",
    "neat_packing", "finetuning_type", "quantization_bit", "quantization_type", "double_quantization",
    "create_new_adapter", "add_tokens", "add_special_tokens", "report_to", "push_to_hub", "overwrite_output_dir",
    "use_dft_loss", "use_eaft_loss", "eaft_alpha",
)  # fmt: skip

# LLaMA-Factory's defaults where ours are others, whatever else the recipe says.
LLAMA_FACTORY_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 5e-5, "lr_scheduler": "linear", "sequence_len": 2048,
    "excess_length_strategy": "truncate", "gradient_checkpointing": True, "lora_r": 8, "logging_steps": 500,
}  # fmt: skip
