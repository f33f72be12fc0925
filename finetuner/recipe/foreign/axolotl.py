"""Axolotl's keys that are not ours by the same name, and their meaning here.

Most of Axolotl's keys are ours, with its meaning. Those are in the sections, whose KeyFacts say its other names for a
key and where ours means something else. Names and meanings: axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas, 2025
to 2026.
"""

from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl_kernels import KERNELS, RARE
from finetuner.recipe.foreign.base import Foreign, blocked, ignored, same, translated
from finetuner.redaction import SECRET_KEYS

_LOSS_HEAD = (
    "here the chunked loss head keeps (tokens x vocabulary) logits out of memory, in the place of fused cross entropy; "
    "Liger's fused RMSNorm, RoPE, SwiGLU and LayerNorm kernels are not applied"
)
_KERNELS = "the fused LoRA kernels are not applied: the result is the same, the step somewhat slower and larger"
_PACKER = "packing here is best-fit-decreasing over the whole dataset: it has no groups or bins to size"
_LOADING = "weights are always loaded in a memory-saving way"
_RL = "preference and reinforcement learning"
_MOE = "options for mixtures of experts"
_MULTIMODAL = "images and audio"
_SP = "splitting one sequence over several GPUs"


def _attention(name: str) -> Foreign:
    """The meaning of `sdp_attention: true` and its kind, from before attn_implementation."""
    return translated(lambda on: {"attn_implementation": name} if on else {})


def _flash(on: Any) -> Mapping[str, Any]:
    # "auto", not "flash_attention_2": the same recipe then runs on a laptop too, through SDPA.
    return {"attn_implementation": "auto" if on else "sdpa"}


def _pretraining(given: Any) -> Mapping[str, Any]:
    """Streamed datasets for pretraining_dataset: one entry, a list of them, or a path alone."""
    if given in ("", [], {}):
        return {}
    entries: list[Any] = []
    for entry in given if isinstance(given, list) else [given]:
        values = {"path": entry} if isinstance(entry, str) else entry
        if isinstance(values, dict):  # anything else is refused as an entry of datasets
            values = {"field" if key == "text_column" else key: value for key, value in values.items()}
            if values.get("type") in (None, "pretrain"):
                values["type"] = "completion"
        entries.append(values)
    return {"datasets": entries, "streaming": True}


def _plain_precision(key: str) -> Foreign:
    return translated(lambda on: {key: True} if on else {})


AXOLOTL: dict[str, Foreign] = {
    **KERNELS,
    **RARE,
    "auto_resume_from_checkpoints": translated(lambda on: {"resume_from_checkpoint": True} if on else {}),
    "metric_for_best_model": blocked("a metric other than eval_loss", says_nothing=("eval_loss", "loss")),
    "greater_is_better": blocked("a metric other than eval_loss, which is better when lower"),
    # what the model's own files say
    **same("model_type type_of_model", ignored("the model's own config says which class it is")),
    **same(
        "tokenizer_type tokenizer_use_fast tokenizer_legacy", ignored("the tokenizer's own files say which class it is")
    ),
    # trackers and uploads
    "push_to_hub": ignored("the result is uploaded if hub_model_id is given", loud=True),
    **same(
        "revision_of_model model_revision",
        blocked(
            "a revision of the model",
            "Download it (`hf download MODEL --revision REVISION --local-dir FOLDER`), and write `base_model: FOLDER`.",
        ),
    ),
    "gradient_checkpointing_kwargs": ignored("recomputing is never reentrant: the gradient is the same either way"),
    **same(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers",
        ignored("every trained weight is used in each step; buckets are those of PyTorch"),
    ),
    "shuffle_merged_datasets": ignored("all rows are shuffled again in each epoch"),
    "data_seed": blocked("a seed of the data's own", "Set seed."),
    "loraplus_lr_embedding": ignored("LoRA adapts linear layers alone; embeddings have embedding_lr"),
    **same("lr_decay_steps lr_decay_ratio", blocked("this detail of the schedule")),
    # attention
    "flash_attention": translated(_flash),
    "sdp_attention": _attention("sdpa"),
    "eager_attention": _attention("eager"),
    "flex_attention": translated(lambda on: {"attn_implementation": "auto"} if on else {}),
    "xformers_attention": translated(lambda on: {"attn_implementation": "sdpa"} if on else {}),
    # number formats without autocast
    "bfloat16": _plain_precision("bf16"),
    "float16": _plain_precision("fp16"),
    "float32": translated(lambda on: {"bf16": False} if on else {}),
    # said by default
    "strict": ignored("a recipe is always read strictly"),
    "save_safetensors": Foreign(unsupported="writing pickle files", instead="Remove it.", says_nothing=(True,)),
    "tokenizer_save_jinja_files": ignored("the chat template is always saved with the tokenizer"),
    "include_tokens_per_second": ignored("tokens per second are always in metrics.jsonl"),
    "include_tkps": ignored("tokens per second are always in metrics.jsonl"),
    "remove_unused_columns": ignored("only the columns that a format names are read"),
    "wandb_watch": ignored("gradients are not uploaded; grad_norm is in metrics.jsonl"),
    "wandb_log_model": ignored("models are not uploaded to a tracker"),
    "hf_mlflow_log_artifacts": ignored("models are not uploaded to a tracker"),
    "hf_use_auth_token": ignored("the hub token of `hf auth login` is used where there is one"),
    "mean_resizing_embeddings": Foreign(
        unsupported="new embeddings that are drawn at random",
        instead="Remove it, or write true: new rows always start at the mean of the old ones.",
        only_value=True,
    ),
    "embeddings_skip_upcast": ignored("trained embeddings are fp32, and frozen ones have the base's format"),
    "auto_find_batch_size": blocked("looking for a batch size by running out of memory", "Set micro_batch_size."),
    "dataset_processes": ignored("tokenizing uses every core by itself"),
    "dataset_num_proc": ignored("tokenizing uses every core by itself"),
    "dataset_keep_in_memory": ignored("rows are mapped from disk and cached by the system"),
    "preprocess_iterable": ignored("rows are read in batches"),
    "merge_lora": ignored("merging is a command: python -m finetuner.merge RECIPE"),
    "merge_method": ignored("merging streams tensor by tensor"),
    "lora_on_cpu": ignored("merging runs on the CPU, tensor by tensor"),
    "base_model_ignore_patterns": ignored("only safetensors files are fetched"),
    "base_model_config": translated(lambda name: {}),
    "experimental_skip_move_to_device": ignored(_LOADING),
    "low_cpu_mem_usage": ignored(_LOADING),
    "qlora_sharded_model_loading": ignored(_LOADING),
    "gc_steps": ignored("Python's collector runs on its own"),
    "device": ignored("the launcher says which device each rank uses"),
    "device_map": ignored("the launcher says which device each rank uses"),
    "world_size": ignored("the launcher says how many ranks there are"),
    "local_rank": ignored("the launcher says how many ranks there are"),
    "ddp": ignored("several ranks without fsdp or deepspeed are DDP"),
    "is_falcon_derived_model": ignored("the model's own config says what it is"),
    "is_llama_derived_model": ignored("the model's own config says what it is"),
    "is_mistral_derived_model": ignored("the model's own config says what it is"),
    "is_qwen_derived_model": ignored("the model's own config says what it is"),
    "axolotl_config_path": ignored("nothing reads it"),
    "debug": ignored("finetuner check -v and metrics.jsonl say what a run does"),
    "inference": ignored("generating is not part of a training recipe"),
    "default_system_message": blocked("a system message for every template", "Put it into the rows or the template."),
    "split_thinking": blocked("splitting thoughts off for all datasets", "Write it in each entry of datasets."),
    "telemetry": ignored("nothing is reported to anyone"),
    **same(
        " ".join(SECRET_KEYS),
        blocked("secrets in a recipe", "Use `hf auth login`, `wandb login` or the service's environment variable."),
    ),
    # Liger, cut cross entropy and other kernels
    **same(
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation "
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling cut_cross_entropy "
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp "
        "unsloth_cross_entropy_loss unsloth_rms_norm unsloth_rope chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks use_kernels",
        ignored(_LOSS_HEAD, loud=True),
    ),
    **same(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel unsloth_lora_mlp unsloth_lora_qkv "
        "unsloth_lora_o",
        ignored(_KERNELS, loud=True),
    ),
    **same("sample_packing_group_size sample_packing_bin_size sample_packing_sequentially", ignored(_PACKER)),
    **same("multipack_real_batches pretrain_multipack_buffer_size", ignored(_PACKER)),
    "batch_flattening": ignored("sample_packing does this job"),
    **same(
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor",
        ignored("batches are cut from a token store in memory: there are no workers to tune"),
    ),
    "dataloader_drop_last": blocked("dropping an epoch's last rows", "Remove it: every row is seen once an epoch."),
    "s2_attention": blocked("shifted sparse attention", "Write attn_implementation: auto."),
    # generation while training
    **same(
        "eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset "
        "bench_split",
        blocked(
            "generating during evaluation", "Remove it; held-out loss and perplexity are taken.", says_nothing=(0, 128)
        ),
    ),
    # other ways of training
    "rl": blocked(_RL),
    **same(
        "trl vllm dpo_beta rl_beta dpo_use_weighting dpo_use_logits_to_keep orpo_alpha rpo_alpha simpo_gamma cpo_alpha "
        "kto_desirable_weight kto_undesirable_weight reward_model process_reward_model num_labels ebft kd_trainer "
        "center_rewards_coefficient dpo_label_smoothing dpo_loss_type dpo_norm_loss dpo_padding_free",
        blocked(_RL),
    ),
    **same("max_prompt_len", Foreign(without_effect="it belongs to preference learning")),
    "pretraining_dataset": translated(_pretraining),
    "pretraining_sample_concatenation": ignored("it belongs to pretraining_dataset"),
    **same(
        "qat quantization ptq torchao_quantization fp8 fp8_enable_fsdp_float8_all_gather nvfp4",
        blocked("training in or for 8-bit and 4-bit floats", "Remove it; `adapter: qlora` trains on a 4-bit base."),
    ),
    **same(
        "gptq gptq_disable_exllama awq", blocked("GPTQ and AWQ bases", "Take the unquantized base and adapter: qlora.")
    ),
    "model_quantization_config": blocked("bases stored in MXFP4", "Take an unquantized base."),
    "model_quantization_config_kwargs": blocked("bases stored in MXFP4", "Take an unquantized base."),
    "use_mxfp4": blocked("MXFP4"),
    "load_in_fp8": blocked("8-bit float bases"),
    **same(
        "relora relora_steps relora_warmup_steps relora_anneal_steps relora_prune_ratio relora_prune_method "
        "relora_cpu_offload jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps",
        blocked("ReLoRA", "Remove it; LoRA is `adapter: lora`."),
    ),
    **same(
        "lisa_n_layers lisa_step_interval lisa_layers_attribute",
        blocked("LISA", "Train some layers with unfrozen_parameters."),
    ),
    **same(
        "lora_target_parameters llama4_linearized_experts quantize_moe_experts use_scattermoe use_sonicmoe "
        "experts_implementation expert_parallel_size moe_kernels router_aux_loss_coef gate_router",
        blocked(_MOE),
    ),
    **same("processor_type image_size image_resize_algorithm multimodal image_base_path", blocked(_MULTIMODAL)),
    **same("is_multimodal skip_multimodal", blocked(_MULTIMODAL)),
    **same(
        "sequence_parallel_degree context_parallel_size tensor_parallel_size "
        "heads_k_stride ring_attn_func sequence_parallel_mode",
        blocked(_SP, "Remove it; `fsdp` shards the model over GPUs.", says_nothing=(1,)),
    ),
    **same("use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks", blocked("PoSE")),
    **same(
        "use_ray ray_run_name ray_num_workers resources_per_worker",
        blocked("Ray", "Start with accelerate launch or torchrun."),
    ),
    **same(
        "use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config",
        blocked("Comet", "Remove it; metrics.jsonl has every figure."),
    ),
    **same(
        "use_otel_metrics otel_metrics_host otel_metrics_port swanlab_project use_swanlab "
        "swanlab_experiment_name swanlab_mode swanlab_workspace",
        blocked("this tracker", "Remove it; metrics.jsonl has every figure."),
    ),
    **same(
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
        ignored("there is no demo page"),
    ),
    "optim_target_modules": blocked("GaLore and its kin", "Choose another optimizer."),
    **same("adam_beta3 adam_epsilon2", blocked("optimizers with a third moment")),
    "lr_div_factor": blocked("the one-cycle schedule", "Write lr_scheduler: cosine."),
    "torchdistx_path": blocked("the AnyPrecision optimizer"),
    "dion_lr": blocked("the Dion optimizer"),
    "batch_size": Foreign(
        unsupported="a total batch size",
        instead="Set gradient_accumulation_steps = batch_size / micro_batch_size, which must be a whole number.",
    ),
    "max_packed_sequence_len": Foreign(unsupported="a packed length of its own", instead="Set sequence_len."),
    **same(
        "max_memory gpu_memory_limit",
        blocked("one rank's model on several devices", "Use fsdp or deepspeed to shard it."),
    ),
    "overrides_of_model_kwargs": blocked("free-form arguments of from_pretrained"),
    "cls_model_config": ignored("the model's own config says which class it is", loud=True),
    # its entropy weighs in nats, LLaMA-Factory's in units of 3
    "use_eaft": translated(lambda on: {"loss_weighting": "entropy", "loss_weighting_entropy_unit": 1.0} if on else {}),
    "eaft_alpha": translated(lambda alpha: {"loss_weighting_exponent": alpha}),
    "eaft_k": translated(lambda tokens: {"loss_weighting_top_k": tokens}),
    "added_tokens_overrides": blocked("renaming reserved tokens", "Add tokens with `tokens`."),
    "fix_untrained_tokens": blocked("mending untrained tokens"),
    "peft": blocked("LoftQ and torchao adapters", "Remove it; `adapter: qlora` quantizes with bitsandbytes."),
    "peft_layer_replication": blocked("replicating layers"),
    "peft_trainable_token_indices": blocked(
        "naming token rows to train", "Rows of new tokens are trained by themselves."
    ),
    "peft_ensure_weight_tying": ignored("tied weights stay tied"),
    "peft_autocast_adapter_dtype": ignored("adapters are trained in fp32"),
    "curriculum_sampling": blocked("an order by difficulty", "Remove it: the order is seeded."),
    "profiler_steps": blocked("profiling"),
    "profiler_steps_start": ignored("it belongs to profiler_steps"),
    "accelerator_config": blocked("free-form settings of Accelerate"),
    "push_dataset_to_hub": blocked("uploading the prepared dataset"),
    "hub_revision": blocked("uploading to a branch"),
    "dynamic_checkpoint": blocked("saving when a file appears"),
    "diffusion": blocked("diffusion language models"),
    "layer_offloading": blocked("layers in host memory", "fsdp_config: {offload_params: true} does that for shards."),
    "shrink_embeddings": blocked("cutting the embeddings down", "Remove it."),
    **same(
        "dataset_shard_num dataset_shard_idx",
        blocked(
            "a part of all datasets, cut after they are shuffled together",
            "Write shards and shards_idx in each dataset: the same share of it, in other rows.",
        ),
    ),
    "skip_prepare_dataset": blocked("rows that are rendered while training"),
    **same(
        "gptq_groupsize gptq_model_v1", blocked("GPTQ and AWQ bases", "Take the unquantized base and adapter: qlora.")
    ),
    "torch_dtype": ignored("bf16 and fp16 say what is computed in"),
    **same(
        "sample_packing_eff_est sample_packing_seq_len_multiplier total_num_tokens total_supervised_tokens "
        "is_preprocess",
        ignored("it is counted from the rows"),
    ),
    **same(
        "use_dsv4_kernels use_glm_dsa_kernels dsv4_fp4_grouped_mode "
        "ple_cpu_offload nvfp4_merge_aware llmcompressor "
        "use_onebitllms reinit_weights",
        blocked("this way of training or computing"),
    ),
    "fused_attn_kernel": ignored(
        "the fused kernel of norm and rotary embedding is not applied: the result is the same, the step slower",
        loud=True,
    ),
    "gemma4_hybrid_attn_impl": translated(lambda on: {"attn_implementation": "sdpa"} if on else {}),
    **same(
        "tiled_mlp tiled_mlp_num_shards",
        ignored("an MLP sees a row at once: the result is the same, and long rows take more memory", loud=True),
    ),
    "freeze_mm_modules": blocked(_MULTIMODAL),
    "expert_parallel_num_nvl_bytes": blocked(_MOE),
    "expert_parallel_token_capacity": blocked(_MOE),
    **same(
        "swanlab_description swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer "
        "swanlab_log_model swanlab_lark_webhook_url swanlab_lark_secret",
        blocked("this tracker", "Remove it; metrics.jsonl has every figure."),
    ),
    "eval_table_max_new_tokens": blocked("generating during evaluation", says_nothing=(0, 128)),
}

# Axolotl's keys for datasets[], as above. `type` and the like are ours; entries.py reads those of chats.
DATASET: dict[str, Foreign] = {
    **same("field_chosen field_rejected field_prompt chosen_format rejected_format prompt_format", blocked(_RL)),
    "input_transform": blocked("code in a recipe"),
    "input_format": blocked("FastChat prompts"),
    "preprocess_shards": ignored("rows are read in batches"),
    "strict": ignored("rows are always read strictly; `on_bad_row: skip` leaves those out that cannot be read"),
    "train_on_inputs": blocked("learning the prompts of one dataset alone", "Write it for the recipe, not a dataset."),
    "skip": blocked("leaving out the first rows of a stream", "Remove it, or cut the file.", says_nothing=(0,)),
    "message_field_training_detail": blocked(
        "training on parts of a message", "Remove it, or make rows of `type: input_output`."
    ),
    **same("step_separator max_completion_length train_on_last_step_only", blocked(_RL)),
    "logprobs_field": blocked("distillation"),
    "temperature": blocked("distillation"),
    "trust_remote_code": blocked("dataset scripts", "Remove it if the dataset is files, else convert it to jsonl."),
}


# Axolotl's row types that are not ours, by how they begin.
UNSUPPORTED_ROW_TYPES: dict[str, str] = {
    **dict.fromkeys(
        ("ebft", "bradley_terry", "stepwise_supervised", "chatml.", "llama3.", "user_defined.", "orpo.", "gsm8k",
         "chat_template.argilla", "passthrough", "zephyr."), _RL),
    "pretrain": "streaming corpora below datasets. Write pretraining_dataset, or `type: completion`",
    "messages": "messages in parts. Write `type: chat_template`",
}  # fmt: skip

# Values of our keys that other tools know and that cannot be done here yet.
UNSUPPORTED_VALUES: dict[str, dict[str, str]] = {
    "optimizer": {
        **dict.fromkeys(
            (
                "optimi_adamw",
                "adopt_adamw",
                "came_pytorch",
                "dion",
                "ademamix",
                "ademamix_8bit",
                "q_galore_adamw8bit",
                "galore_adamw",
                "galore_adamw_8bit",
                "schedule_free_adamw",
                "lomo",
                "adalomo",
                "grokadamw",
                "flash_adamw",
                "stable_adamw",
                "apollo_adamw",
            ),
            "this optimizer. Write adamw_torch",
        ),
    },
    "lr_scheduler": {
        "one_cycle": "the one-cycle schedule, which moves Adam's beta1 too. Write cosine",
        **dict.fromkeys(("reduce_lr_on_plateau", "greedy"), "this schedule. Write cosine"),
    },
    "hub_strategy": dict.fromkeys(
        ("checkpoint", "all_checkpoints"), "uploading the optimizer's state. Write every_save, for the weights alone"
    ),
    "attn_implementation": {
        "fp8": "attention in 8-bit floats",
        "sage": "SageAttention",
        "s2": "shifted sparse attention",
    },
    "peft_init_lora_weights": dict.fromkeys(
        ("pissa", "olora", "eva", "corda", "orthogonal", "loftq"), "this start of an adapter. Write true or gaussian"
    ),
    "adapter": {
        "llama-adapter": "this adapter. Write lora",
        "mora": "this adapter. Write lora",
        "ia3": "this adapter. Write lora",
    },
    "gradient_checkpointing": {
        "offload_disk": "activations on disk. Write true, and `activation_offloading: true` for host memory",
    },
    "activation_offloading": {"disk": "activations on disk. Write true: they are in host memory then"},
}

PLUGINS = {
    "axolotl.integrations.liger.LigerPlugin": _LOSS_HEAD,
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin": _LOSS_HEAD,
}
