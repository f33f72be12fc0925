"""Base, adapter and loss -> the module that is trained."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finetuner.data.cache import packs_held_out
from finetuner.errors import ModelError
from finetuner.export.merge import require_same_base
from finetuner.models.adapter import add_lora, read_adapter, start_from_adapter
from finetuner.models.build import (
    embedding_rows,
    empty_model,
    grow_embeddings,
    load_model,
    recompute_activations,
    train_in_fp32,
    train_only,
)
from finetuner.models.loss import Regularisers, TokenLoss, head_is_composable
from finetuner.models.packing import require_isolation
from finetuner.models.quantized import choose_format, record_of, require_same_record
from finetuner.models.tokenizer import Vocabulary
from finetuner.plan import Plan, Precision
from finetuner.recipe import Recipe
from finetuner.recipe.sections import RegularisationSection
from finetuner.sharding import FsdpPlan
from finetuner.training.parts import has_parts, read_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(
    recipe: Recipe,
    plan: Plan,
    vocabulary: Vocabulary,
    attention: tuple[str, ...],
    checkpoint: Path | None,
    accelerator: Accelerator,
) -> TokenLoss:
    """Base (or, for full fine-tuning, the checkpoint's weights), adapter, and the loss around both; on the CPU if an
    engine takes them to the device in parts."""
    full, config = recipe.adapter.adapter is None, recipe.sharding.fsdp_config
    in_parts = checkpoint is not None and has_parts(checkpoint)
    source = str(checkpoint) if full and checkpoint is not None and not in_parts else recipe.model.base_model
    dtype = torch.float32 if full else DTYPES[plan.precision]
    form = choose_format(recipe.adapter.adapter, recipe.quantization, dtype)
    # Ranks that are handed their part by the main one need no weights of their own; a quantised base each reads itself.
    main_reads = isinstance(plan.engine, FsdpPlan) and plan.engine.main_rank_reads and form is None
    handed = main_reads and not accelerator.is_main_process
    trust = recipe.model.trust_remote_code
    if handed:
        model = empty_model(source, dtype=dtype, attention=attention, trust_remote_code=trust)
    else:
        model = load_model(
            source,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust,
            form=form,
            device=accelerator.device,
        )
    new_ids = ids_to_train(model, vocabulary)
    grow_embeddings(model, len(vocabulary.tokenizer))
    packs = recipe.packing.sample_packing or packs_held_out(recipe.packing)
    if plan.engine is None:
        model.to(accelerator.device)  # before the probe: flash attention has no CPU kernels
        with accelerator.autocast():
            composed = probe(model, packs=packs)
    else:  # it may be larger than the device
        composed = probe_for_all(None if handed else model, packs=packs)
    if recipe.precision.gradient_checkpointing or (config is not None and config.activation_checkpointing):
        recompute_activations(model)
    if full:
        train_only(model, recipe.adapter.unfrozen_parameters)
        if checkpoint is not None and in_parts and not handed:
            read_parts(model, checkpoint, trained_only=False)
        return TokenLoss(model, composed=composed, regularisers=regularisers_of(recipe.regularisation))
    adapted = add_lora(
        model,
        recipe.adapter,
        base_model=recipe.model.base_model,
        seed=plan.seed,
        new_token_ids=new_ids,
    )
    train_in_fp32(adapted)
    if checkpoint is not None:
        require_same_record(checkpoint, record_of(model))
        if in_parts:
            read_parts(adapted, checkpoint, trained_only=True)
        else:
            read_adapter(adapted, checkpoint)
    elif recipe.adapter.lora_model_dir is not None:
        require_same_base(Path(recipe.adapter.lora_model_dir), recipe.model.base_model)
        start_from_adapter(adapted, Path(recipe.adapter.lora_model_dir))
    return TokenLoss(adapted, composed=composed, regularisers=regularisers_of(recipe.regularisation))


def regularisers_of(section: RegularisationSection) -> Regularisers:
    return Regularisers(
        label_smoothing=section.label_smoothing_factor,
        z_loss=section.z_loss_coefficient,
        noise_alpha=section.neftune_noise_alpha or 0.0,
    )


def probe(model: "PreTrainedModel", *, packs: bool) -> bool:
    """Whether the loss head can be composed. Raises ModelError for a model that cannot be trained like this."""
    composed = head_is_composable(model)
    if packs:
        require_isolation(model)
    return composed


def probe_for_all(model: "PreTrainedModel | None", *, packs: bool) -> bool:
    """As probe, on the main rank, which has a model; all ranks get its word, so that a refusal ends all of them."""
    word: list[bool | str] = [False]
    if model is not None:
        attention = model.config._attn_implementation
        if next(model.parameters()).device.type == "cpu" and attention.startswith("flash"):
            model.set_attn_implementation("sdpa")  # flash attention has no CPU kernels
        try:
            word = [probe(model, packs=packs)]
        except ModelError as error:
            word = [str(error)]
        model.set_attn_implementation(attention)
    answer = broadcast_object_list(word)[0]
    if isinstance(answer, str):
        raise ModelError(answer)
    return bool(answer)


def ids_to_train(model: "PreTrainedModel", vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens that the base model has never seen: added by the recipe, or beyond the base's embedding rows because the
    tokenizer is another one."""
    known = len(vocabulary.tokenizer) - len(vocabulary.new_ids)
    return tuple(range(min(known, embedding_rows(model)), len(vocabulary.tokenizer)))
