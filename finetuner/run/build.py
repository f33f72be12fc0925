"""Base, adapter and loss -> the module that is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from finetuner.checkpoint.shards import has_parts, read_parts
from finetuner.data.tokenizer import Vocabulary
from finetuner.errors import ModelError
from finetuner.models.adapter import add_lora, read_adapter, start_from_adapter
from finetuner.models.adapter_folder import require_same_base
from finetuner.models.compilation import compile_layers, wants_compilation
from finetuner.models.dtypes import DTYPES
from finetuner.models.lazy_weights import Promises, Report
from finetuner.models.load import (
    embedding_rows,
    empty_model,
    grow_embeddings,
    load_model,
    promised_model,
    recompute_activations,
    train_in_fp32,
    train_only,
)
from finetuner.models.quantized import choose_format, record_of, require_same_record
from finetuner.objectives.next_token import Regularisers, TokenLoss
from finetuner.plan.parallel import FsdpPlan, ZeroPlan
from finetuner.plan.run import Plan
from finetuner.recipe import Recipe
from finetuner.recipe.sections import AdapterSection, RegularizationSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Assembled:
    """The module that is trained, and what its parameters are still to be given when they have their places."""

    loss: TokenLoss
    promises: Promises | None = None


def build_model(
    recipe: Recipe,
    base: str,
    plan: Plan,
    vocabulary: Vocabulary,
    attention: tuple[str, ...],
    checkpoint: Path | None,
    accelerator: Accelerator,
    report: Report = lambda done, total: None,
) -> Assembled:
    """`base`, a folder or hub id (or, for full fine-tuning, the checkpoint's weights), adapter, and the loss around
    both; on the CPU if an engine takes them to the device in parts."""
    full, config = recipe.adapter.adapter is None, recipe.sharding.fsdp_config
    model, promises = _load_base(recipe, base, plan, attention, checkpoint, accelerator, report)
    new_ids = ids_to_train(model, vocabulary)
    if promises is not None:
        promises.keep(read_at_once(model, recipe.adapter, len(vocabulary.tokenizer)), torch.device("cpu"))
    grow_embeddings(model, len(vocabulary.tokenizer))
    if plan.engine is None:
        model.to(accelerator.device)
    if recipe.precision.gradient_checkpointing or (config is not None and config.activation_checkpointing):
        recompute_activations(model)
    in_parts = checkpoint is not None and has_parts(checkpoint)
    if full:
        train_only(model, recipe.adapter.unfrozen_parameters)
        if checkpoint is not None and in_parts:
            read_parts(model, checkpoint, trained_only=False)
        _compile(recipe, plan, model, accelerator)
        return Assembled(TokenLoss(model, regularisers=regularisers_of(recipe.regularization)), promises)
    adapted = add_lora(
        model,
        recipe.adapter,
        base_model=base,
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
        require_same_base(Path(recipe.adapter.lora_model_dir), base)
        start_from_adapter(adapted, Path(recipe.adapter.lora_model_dir))
    _compile(recipe, plan, model, accelerator)
    return Assembled(TokenLoss(adapted, regularisers=regularisers_of(recipe.regularization)), promises)


def _compile(recipe: Recipe, plan: Plan, model: "PreTrainedModel", accelerator: Accelerator) -> None:
    """The layers with what is adapted in them, before they are spread: each is gathered around its compiled code."""
    engine = None if plan.engine is None else "fsdp" if isinstance(plan.engine, FsdpPlan) else "deepspeed"
    quantised = record_of(model) is not None
    if wants_compilation(recipe.compilation, accelerator.device, engine=engine, quantised=quantised):
        compile_layers(model, recipe.compilation)


def regularisers_of(section: RegularizationSection) -> Regularisers:
    return Regularisers(
        label_smoothing=section.label_smoothing_factor,
        z_loss=section.z_loss_coefficient,
        noise_alpha=section.neftune_noise_alpha or 0.0,
    )


def _load_base(
    recipe: Recipe,
    base: str,
    plan: Plan,
    attention: tuple[str, ...],
    checkpoint: Path | None,
    accelerator: Accelerator,
    report: Report,
) -> "tuple[PreTrainedModel, Promises | None]":
    """Promised, if the engine keeps parts of it on each rank; else read by every rank, or by the main one as FSDP's
    cpu_ram_efficient_loading asks."""
    full = recipe.adapter.adapter is None
    in_parts = checkpoint is not None and has_parts(checkpoint)
    source = str(checkpoint) if full and checkpoint is not None and not in_parts else base
    dtype, trust = torch.float32 if full else DTYPES[plan.precision], recipe.model.trust_remote_code
    form = choose_format(recipe.adapter.adapter, recipe.quantization, dtype)
    in_shards = isinstance(plan.engine, FsdpPlan) or (isinstance(plan.engine, ZeroPlan) and plan.engine.stage == 3)
    caches = recipe.quantization.quantized_cache
    # What takes weights from the disk tensor by tensor: not a checkpoint in parts, nor code that comes with a model
    if not (in_parts and full) and not trust and (form is None or form.kind != "int8"):
        folder = Path(recipe.data.dataset_prepared_path) / "quantized"
        promised = promised_model(
            source,
            dtype=dtype,
            attention=attention,
            form=form,
            device=accelerator.device,
            cache_folder=folder if caches and (accelerator.is_main_process or not in_shards) else None,
            report=report,
            # DeepSpeed casts a whole model before it spreads it, and so would occupy memory for all of it
            cast_to=DTYPES[plan.precision] if isinstance(plan.engine, ZeroPlan) and in_shards else None,
        )
        if promised is not None:
            model, promises = promised
            if in_shards:
                return model, promises
            promises.keep_all(accelerator.device if plan.engine is None else torch.device("cpu"))
            return model, None
    if caches:
        raise ModelError(
            f"quantized_cache: the tensors of '{source}' are renamed or joined as they load, which the cache does not "
            "know. Write `quantized_cache: false`."
        )
    main_reads = isinstance(plan.engine, FsdpPlan) and plan.engine.main_rank_reads and form is None and not in_parts
    if main_reads and not accelerator.is_main_process:
        return empty_model(source, dtype=dtype, attention=attention, trust_remote_code=trust), None
    model = load_model(
        source, dtype=dtype, attention=attention, trust_remote_code=trust, form=form, device=accelerator.device
    )
    return model, None


def read_at_once(model: "PreTrainedModel", section: AdapterSection, vocab_size: int) -> list[nn.Parameter]:
    """Parameters whose values are needed before the model is spread: those that the adapter copies or measures, and
    tables that grow by the mean of their rows."""
    if section.peft_use_dora:  # the sizes of the columns of every weight that it adapts
        return list(model.parameters())
    wanted = list(section.lora_modules_to_save or ())
    found = [p for name, p in model.named_parameters() if any(part in wanted for part in name.split("."))]
    if vocab_size > embedding_rows(model) or wanted:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        found += [p for table in tables if table is not None for p in table.parameters()]
    return found


def ids_to_train(model: "PreTrainedModel", vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens that the base model has never seen: added by the recipe, or beyond the base's embedding rows because the
    tokenizer is another one."""
    known = len(vocabulary.tokenizer) - len(vocabulary.new_ids)
    return tuple(range(min(known, embedding_rows(model)), len(vocabulary.tokenizer)))
