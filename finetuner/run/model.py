"""Base model, adapter and objective -> the module that is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetuner.checkpoint.shards import is_sharded, read_shards
from finetuner.data.tokenizer import Vocabulary
from finetuner.errors import ModelError
from finetuner.models.adapter import add_lora, read_adapter, start_from_adapter
from finetuner.models.adapter_folder import require_same_base
from finetuner.models.compilation import compile_layers, wants_compilation
from finetuner.models.dtypes import DTYPES
from finetuner.models.lazy_weights import Promises, Report
from finetuner.models.load import (
    count_parameters,
    embedding_rows,
    empty_model,
    grow_embeddings,
    length_notes,
    load_model,
    promised_model,
    recompute_activations,
    train_in_fp32,
    train_only,
    vocabulary_parameters,
)
from finetuner.models.model_flops import work_of
from finetuner.models.quantized import choose_format, record_of, require_same_record
from finetuner.objectives import build_objective
from finetuner.objectives.loss_module import LossModule
from finetuner.plan.flops import Work
from finetuner.plan.run import Plan
from finetuner.recipe.sections import AdapterSection, CompileSection
from finetuner.run.inputs import Inputs
from finetuner.run.session import Session
from finetuner.run.start import Start

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BuiltModel:
    """The module that is trained, before an engine lays it over the ranks.

    `lazy`: weights that are still to be read, when their shards have their places; `num_trained`, `num_parameters`:
    elements; `table_names`: parameters with a row for each token; `work`: FLOPs, where a formula holds.
    """

    loss: LossModule
    lazy: Promises | None
    num_trained: int
    num_parameters: int
    table_names: frozenset[str]
    work: Work | None


def build_model(session: Session, inputs: Inputs, start: Start) -> BuiltModel:
    """Build base model, adapter and objective as one module, from the base's files or from the checkpoint's.

    It is on the CPU if an engine takes it to the device in shards. Raises ModelError for parts that do not fit.
    """
    recipe, screen = session.recipe, session.screen
    with screen.work("loading the model", "MB") as work:
        model, lazy = _load_base(session, inputs, start, work.at_bytes)
        adapted = _prepare_to_train(model, session, inputs, start, lazy)
    loss = LossModule(adapted, build_objective(recipe))
    longest = inputs.longest_document or recipe.data.sequence_len
    for note in length_notes(loss.unwrapped, longest):
        screen.line(f"note: {note}")
    num_trained, num_parameters = count_parameters(loss)
    return BuiltModel(
        loss=loss,
        lazy=lazy,
        num_trained=num_trained,
        num_parameters=num_parameters,
        table_names=vocabulary_parameters(loss, loss.unwrapped),
        work=work_of(loss.model, loss.unwrapped, longest),
    )


def _prepare_to_train(
    model: "PreTrainedModel", session: Session, inputs: Inputs, start: Start, lazy: Promises | None
) -> "PreTrainedModel | PeftModel":
    """Grow the vocabulary, add the adapter or freeze what is not trained, and take over saved weights."""
    recipe, plan, checkpoint = session.recipe, session.plan, start.checkpoint
    new_ids = ids_to_train(model, inputs.vocabulary)
    vocab_size = len(inputs.vocabulary.tokenizer)
    if lazy is not None:
        lazy.keep(read_at_once(model, recipe.adapter, vocab_size), torch.device("cpu"))
    grow_embeddings(model, vocab_size)
    if plan.parallel.is_replicated:
        model.to(start.accelerator.device)
    fsdp = recipe.sharding.fsdp_config
    if recipe.precision.gradient_checkpointing or (fsdp is not None and fsdp.activation_checkpointing):
        recompute_activations(model)
    if session.is_adapter:
        adapted: PreTrainedModel | PeftModel = _adapted(model, session, inputs, checkpoint, new_ids)
    else:
        train_only(model, recipe.adapter.unfrozen_parameters)
        if checkpoint is not None and is_sharded(checkpoint):
            read_shards(model, checkpoint, trained_only=False)
        adapted = model
    _compile(recipe.compilation, plan, model, start.accelerator.device)
    return adapted


def _adapted(
    model: "PreTrainedModel", session: Session, inputs: Inputs, checkpoint: Path | None, new_ids: tuple[int, ...]
) -> "PeftModel":
    """Add the adapter, with the weights of the checkpoint, of lora_model_dir, or new ones."""
    section = session.recipe.adapter
    adapted = add_lora(model, section, base_model=inputs.base, seed=session.plan.seed, new_token_ids=new_ids)
    train_in_fp32(adapted)
    if checkpoint is not None:
        require_same_record(checkpoint, record_of(model))
        if is_sharded(checkpoint):
            read_shards(adapted, checkpoint, trained_only=True)
        else:
            read_adapter(adapted, checkpoint)
    elif section.lora_model_dir is not None:
        require_same_base(Path(section.lora_model_dir), inputs.base)
        start_from_adapter(adapted, Path(section.lora_model_dir))
    return adapted


def _compile(section: CompileSection, plan: Plan, model: "PreTrainedModel", device: torch.device) -> None:
    """Compile the layers with what is adapted in them, before they are sharded: each is gathered around its code."""
    quantised = record_of(model) is not None
    if wants_compilation(section, device, engine=plan.parallel.recipe_word, quantised=quantised):
        compile_layers(model, section)


def _load_base(
    session: Session, inputs: Inputs, start: Start, report: Report
) -> "tuple[PreTrainedModel, Promises | None]":
    """Promised, if the engine keeps parts of it on each rank; else read by every rank, or by the main one as FSDP's
    cpu_ram_efficient_loading asks."""
    recipe, plan, checkpoint, accelerator = session.recipe, session.plan, start.checkpoint, start.accelerator
    base, attention = inputs.base, inputs.attention
    full = recipe.adapter.adapter is None
    in_parts = checkpoint is not None and is_sharded(checkpoint)
    source = str(checkpoint) if full and checkpoint is not None and not in_parts else base
    dtype, trust = torch.float32 if full else DTYPES[plan.precision], recipe.model.trust_remote_code
    form = choose_format(recipe.adapter.adapter, recipe.quantization, dtype)
    in_shards = plan.parallel.shards_weights
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
            cast_to=DTYPES[plan.precision] if plan.parallel.casts_full_model and in_shards else None,
        )
        if promised is not None:
            model, promises = promised
            if in_shards:
                return model, promises
            promises.keep_all(accelerator.device if plan.parallel.is_replicated else torch.device("cpu"))
            return model, None
    if caches:
        raise ModelError(
            f"quantized_cache: the tensors of '{source}' are renamed or joined as they load, which the cache does not "
            "know. Write `quantized_cache: false`."
        )
    main_reads = plan.parallel.main_rank_reads and form is None and not in_parts
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
