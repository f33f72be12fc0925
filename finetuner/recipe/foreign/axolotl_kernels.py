"""Axolotl's keys that choose kernels or save memory, and keys of its older or rarer features; see axolotl.py."""

from finetuner.recipe.foreign.base import Foreign, blocked, ignored, same, translated

_SAME_ATTENTION = "attention is computed by other kernels, with the same result"
_TRAINING = "this way of training or computing"

KERNELS: dict[str, Foreign] = {
    "fused_attn_kernel": ignored("norms and rotations are computed one by one, with the same result", loud=True),
    **same(
        "flex_attn_compile_kwargs gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen",
        ignored(_SAME_ATTENTION),
    ),
    "flash_optimum": translated(lambda on: {"attn_implementation": "auto"} if on else {}),
    "tiled_mlp": ignored("MLPs are computed in one piece: the same result, with more memory for long rows", loud=True),
    **same("tiled_mlp_num_shards tiled_mlp_use_original_mlp", ignored("it belongs to tiled_mlp")),
    "selective_checkpointing": ignored(
        "gradient_checkpointing recomputes whole layers: the same result, with more time", loud=True
    ),
    **same("torch_empty_cache_steps gc_collect_steps", ignored("memory is given back by itself")),
    "torch_compile_options": ignored("the compiler's own choices are taken, with the same result"),
    **same("num_dataset_shards_to_save sample_packing_mp_start_method", ignored("rows are prepared in one store")),
    "pad_to_multiple_of": ignored("padding is neither seen nor trained on"),
    "shuffle_before_merging_datasets": ignored("all rows are shuffled again in each epoch"),
}

RARE: dict[str, Foreign] = {
    **same(
        "deepcompile fp32_norms fp32_norm_classes scaling_softmax scaling_softmax_factor scaling_softmax_bias "
        "sage_attention fp8_config",
        blocked(_TRAINING),
    ),
    **same("landmark_attention xpos_rope", blocked("other attention than the model's own")),
    **same("log_sweep_min_lr log_sweep_max_lr", blocked("a sweep of the learning rate")),
    **same(
        "spectrum_top_fraction spectrum_model_name",
        blocked("choosing layers by their signal (Spectrum)", "Name them in unfrozen_parameters."),
    ),
    "trainer_cls": blocked("trainers by the names of their classes"),
    "eval_sequence_len": blocked("another length for held-out rows"),
    **same("lora_rank_pattern lora_alpha_pattern", blocked("ranks by the names of layers")),
    **same("processor_kwargs role_boundaries", blocked("images and audio")),
    **same("dion_momentum dion_rank_fraction dion_rank_multiple_of", blocked("the Dion optimizer")),
    **same(
        "qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
        blocked("GaLore and its kin", "Choose another optimizer."),
    ),
    **same(
        "precompute_ref_log_probs dpo_use_liger_kernel dpo_loss_weights dpo_generate_during_eval",
        blocked("preference and reinforcement learning"),
    ),
    **same(
        "num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample",
        blocked("choosing how texts are sampled", "Remove it; generate_samples shows texts."),
    ),
}
