"""Base model, adapter and objective -> the module that is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetuner.checkpoint.shards import is_sharded, read_shards
from finetuner.data.tokenizer import Vocabulary
from finetuner.errors import ModelError
from finetuner.models.activation_checkpointing import recompute_activations
from finetuner.models.activation_offloading import HostedActivations
from finetuner.models.adapter import add_lora, read_adapter, start_from_adapter
from finetuner.models.adapter_folder import require_same_base
from finetuner.models.compilation import compile_layers, wants_compilation
from finetuner.models.context_length import length_notes
from finetuner.models.embeddings import embedding_rows, grow_embeddings, rows_for_tokens, vocabulary_parameters
from finetuner.models.lazy_weights import LazyWeights, ReportBytes
from finetuner.models.loading_plan import choose_loading, load_base
from finetuner.models.model_flops import training_flops
from finetuner.models.quant_record import record_of, require_same_record
from finetuner.models.trainable import count_parameters, train_in_fp32, train_only
from finetuner.objectives import build_objective
from finetuner.objectives.loss_module import LossModule
from finetuner.plan.flops import TrainingFlops
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
    lazy: LazyWeights | None
    num_trained: int
    num_parameters: int
    table_names: frozenset[str]
    work: TrainingFlops | None


def build_model(
    session: Session, inputs: Inputs, start: Start, report: ReportBytes = lambda done, total: None
) -> BuiltModel:
    """Build base model, adapter and objective as one module, from the base's files or from the checkpoint's.

    It is on the CPU if an engine takes it to the device in shards. `report` is also told of weights that are read only
    then. Raises ModelError for parts that do not fit.
    """
    recipe, screen = session.recipe, session.screen
    model, lazy = _load_base(session, inputs, start, report)
    adapted = _prepare_to_train(model, session, inputs, start, lazy)
    activations = HostedActivations() if recipe.precision.activation_offloading else None
    loss = LossModule(adapted, build_objective(recipe), activations=activations)
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
        work=training_flops(loss.model, loss.unwrapped, longest),
    )


def _prepare_to_train(
    model: "PreTrainedModel", session: Session, inputs: Inputs, start: Start, lazy: LazyWeights | None
) -> "PreTrainedModel | PeftModel":
    """Grow the vocabulary, add the adapter or freeze what is not trained, and take over saved weights."""
    recipe, plan, checkpoint = session.recipe, session.plan, start.checkpoint
    new_ids = ids_to_train(model, inputs.vocabulary)
    vocab_size = rows_of_tables(model, session, inputs)
    if lazy is not None:
        lazy.materialize(parameters_read_early(model, recipe.adapter, vocab_size), torch.device("cpu"))
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


def rows_of_tables(model: "PreTrainedModel", session: Session, inputs: Inputs) -> int:
    """Count the rows that embedding and head have at least. Raises ModelError for rows that an adapter would lose."""
    section, num_tokens = session.recipe.adapter, len(inputs.vocabulary.tokenizer)
    rows = rows_for_tokens(num_tokens, to_32x=session.recipe.tokenizer.resize_token_embeddings_to_32x)
    unused = rows - max(num_tokens, embedding_rows(model))
    if unused > 0 and section.adapter is not None and not section.lora_modules_to_save:
        raise ModelError(
            f"resize_token_embeddings_to_32x would add {unused} rows that no token has, and an adapter does not carry "
            "them: the merged model would not be the trained one.\nRemove it, or save the tables beside the adapter: "
            "`lora_modules_to_save: [embed_tokens, lm_head]`."
        )
    return rows


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
    quantized = record_of(model) is not None
    if wants_compilation(section, device, engine=plan.parallel.recipe_word, quantized=quantized):
        compile_layers(model, section)


def _load_base(
    session: Session, inputs: Inputs, start: Start, report: ReportBytes
) -> "tuple[PreTrainedModel, LazyWeights | None]":
    """Load the base model as the layout over the ranks wants it, with the weights that are still to be read."""
    recipe, parallel, checkpoint = session.recipe, session.plan.parallel, start.checkpoint
    loading = choose_loading(
        inputs.base,
        checkpoint,
        checkpoint_is_sharded=checkpoint is not None and is_sharded(checkpoint),
        adapter=recipe.adapter.adapter,
        quantization=recipe.quantization,
        precision=session.plan.precision,
        parallel=parallel,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return load_base(
        loading,
        attention=inputs.attention,
        device=start.accelerator.device,
        is_main_rank=start.accelerator.is_main_process,
        prepared_path=recipe.data.dataset_prepared_path,
        report=report,
    )


def parameters_read_early(model: "PreTrainedModel", section: AdapterSection, vocab_size: int) -> list[nn.Parameter]:
    """Parameters whose values are needed before the model is sharded: those that the adapter copies or measures, and
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
