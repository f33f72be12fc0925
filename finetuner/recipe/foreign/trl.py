"""TRL's keys and its defaults, and those of alignment-handbook and open-r1, whose recipes are TRL's with a few more.

Names and defaults: huggingface/trl 1.16.0, the dataclasses SFTConfig, ModelConfig, ScriptArguments and
DatasetMixtureConfig; alignment-handbook and open-r1, configs.py, 2025. A test holds the names against the installed
TRL where there is one, and the defaults against a table of TRL's own.
Keys that mean something only together are in trl_groups.py.
"""

from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, renamed, same, translated
from finetuner.recipe.foreign.trainers import TRAINING_ARGUMENTS

PREFERENCE = "preference and reinforcement learning"
_LAUNCH = "the launcher says how many processes there are: accelerate launch, or torchrun"

# Keys of DPOConfig, ORPOConfig, KTOConfig, RewardConfig, GRPOConfig, RLOOConfig and the rest, and of the scripts' own
# arguments, that SFTConfig does not have.
_PREFERENCE_KEYS = (
    "beta ref_model ref_model_init_kwargs reference_free force_use_ref_model model_adapter_name ref_adapter_name "
    "precompute_ref_log_probs precompute_ref_batch_size ref_model_mixup_alpha ref_model_sync_steps sync_ref_model "
    "max_prompt_length max_completion_length max_target_length label_smoothing loss_weights rpo_alpha ld_alpha "
    "use_weighting use_logits_to_keep discopop_tau f_divergence_type f_alpha_divergence_coef simpo_gamma cpo_alpha "
    "alpha lmbda seq_kd teacher_model_name_or_path teacher_model_init_kwargs desirable_weight undesirable_weight "
    "center_rewards_coefficient disable_dropout generate_during_eval is_encoder_decoder padding_value "
    "label_pad_token_id reward_funcs reward_weights reward_model reward_model_path reward_model_name_or_path "
    "judge_model_name_or_path num_generations num_generations_eval num_iterations num_ppo_epochs num_mini_batches "
    "steps_per_generation generation_batch_size generation_kwargs scale_rewards normalize_advantages epsilon_high "
    "epsilon delta importance_sampling_level top_entropy_quantile mask_truncated_completions log_completions "
    "num_completions_to_print log_unique_prompts wandb_log_unique_prompts shuffle_dataset_prompts "
    "cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct cosine_max_value_correct cosine_max_len "
    "repetition_n_grams repetition_max_penalty max_completion_len soft_punish_cache code_language code_provider "
    "parallel_code_exec_per_proc e2b_router_url ioi_provider dataset_prompt_column missing_eos_penalty "
    "use_vllm vllm_mode vllm_device vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout "
    "vllm_gpu_memory_utilization vllm_max_model_len vllm_max_model_length vllm_dtype vllm_tensor_parallel_size "
    "vllm_guided_decoding_regex vllm_structured_outputs_regex temperature top_p top_k min_p repetition_penalty "
    "cache_implementation use_transformers_paged ds3_gather_for_generation cast_lm_head_to_fp32 "
    "max_tool_calling_iterations sapo_temperature_neg sapo_temperature_pos kl_coef init_kl_coef entropy_coef "
    "reward_clip_range token_entropy_percentile_threshold "
    "entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target log_completions_hub_repo log_multimodal "
    "max_new_tokens multi_objective_aggregation off_policy_mask_threshold transformers_continuous_batching_config "
    "use_adaptive_entropy use_bias_correction_kl use_transformers_continuous_batching vespo_k_neg vespo_k_pos "
    "vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode vllm_group_port vllm_importance_sampling_cap "
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_correction "
    "vllm_importance_sampling_mode vllm_model_impl code_eval_test_batch_size code_eval_scoring_mode "
    "morph_router_url"
)

TRL: dict[str, Foreign] = TRAINING_ARGUMENTS | {
    # the model
    "model_revision": blocked("a revision of the model", "Give its downloaded folder.", says_nothing=("main",)),
    "tokenizer_name_or_path": renamed("tokenizer"),
    "use_flash_attention_2": translated(lambda on: {"attn_implementation": "auto"} if on else {}),
    "use_kernels": AXOLOTL["use_kernels"],
    "router_aux_loss_coef": AXOLOTL["router_aux_loss_coef"],
    "ignore_bias_buffers": ignored("no buffer is sent between ranks"),
    "code_revision": ignored("code of a model comes with the model"),
    # the adapter
    "use_rslora": renamed("peft_use_rslora"),
    "use_dora": renamed("peft_use_dora"),
    "lora_task_type": Foreign(unsupported="adapters of other tasks than causal language modeling",
                              instead="Remove it.", says_nothing=("CAUSAL_LM",)),
    "lora_target_parameters": AXOLOTL["lora_target_parameters"],
    # the rows
    "dataset_num_proc": ignored("tokenizing uses every core by itself"),
    "dataset_batch_size": ignored("rows are read in batches"),
    "max_seq_length": renamed("sequence_len"),
    "max_length": renamed("sequence_len"),
    "truncation_mode": Foreign(unsupported="keeping the end of a long row",
                               instead="Remove it: the start is kept.", says_nothing=("keep_start",)),
    "shuffle_dataset": ignored("all rows are shuffled again in each epoch"),
    "packing": renamed("sample_packing"),
    "eval_packing": renamed("eval_sample_packing"),
    "padding_free": ignored("padding has no part in the loss; sample_packing leaves it out"),
    "pad_to_multiple_of": ignored("padding has no part in the loss"),
    "num_of_sequences": ignored("packing here is over the whole dataset"),
    "chars_per_token": ignored("packing here is over the whole dataset"),
    "truncation_side": Foreign(unsupported="keeping the end of a long row",
                               instead="Remove it: the start is kept.", says_nothing=("right",)),
    "system_prompt": ignored("open-r1 uses it for benchmarks alone in SFT", loud=True),
    # the loss
    "loss_type": Foreign(
        unsupported="losses other than those of the next token: those of preference learning",
        says_nothing=("nll", "chunked_nll"),
    ),
    # what alignment-handbook and open-r1 do besides training
    "benchmarks": blocked("benchmarks after training", "Remove it, and run them on the result."),
    "callbacks": blocked("callbacks by name", "Remove it; hub_strategy: every_save uploads at each save."),
    "hub_model_revision": blocked("an upload to a branch", says_nothing=("main",)),
    "push_to_hub_revision": blocked("an upload to a branch"),
    "overwrite_hub_revision": ignored("it belongs to push_to_hub_revision"),
    "wandb_run_group": ignored("the run's group is only shown by the tracker", loud=True),
    # how it is started
    **same("num_processes num_machines machine_rank main_process_ip main_process_port gpu_ids", ignored(_LAUNCH)),
    "config_file": ignored("name Accelerate's own file where you launch: accelerate launch --config_file", loud=True),
    "accelerate_config": ignored(
        "it says how the model is spread over GPUs: write fsdp and fsdp_config, or deepspeed, for that", loud=True),
    "env": ignored("a recipe sets no environment variables: export them before the start", loud=True),
    "sanity_check": blocked("a run on a few rows", "Write max_samples under the dataset."),
    "concatenate_dataset": ignored("datasets are always joined"),
    # preference learning
    **same(_PREFERENCE_KEYS, Foreign(unsupported=PREFERENCE, instead="Only SFT recipes of TRL are converted.",
                                     says_nothing=(0, 0.0))),
}  # fmt: skip

# What TRL does when nothing is said, where ours is something else; more in trl_groups.py, where it depends.
TRL_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 2e-5, "lr_scheduler": "linear",
    "optimizer": "adamw_torch_fused", "sequence_len": 1024, "gradient_checkpointing": True, "logging_steps": 10,
    "lora_dropout": 0.05, "lora_target_modules": "peft-default",
}  # fmt: skip
