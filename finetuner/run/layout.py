"""The built model laid over the ranks, with what the loop needs beside it."""

from dataclasses import dataclass

from finetuner.checkpoint.contents import TrainedModel
from finetuner.data.batches import BatchLayout, layout_of
from finetuner.data.cache import packs_held_out
from finetuner.data.token_bytes import token_bytes
from finetuner.data.tokenizer import special_ids
from finetuner.models.document_isolation import wants_flat_packs
from finetuner.models.trainable import trainable_parameters
from finetuner.parallel.build import build_engine
from finetuner.parallel.engine import EngineRequest
from finetuner.plan.flops import peak_of
from finetuner.run.inputs import Inputs
from finetuner.run.model import BuiltModel
from finetuner.run.session import Session
from finetuner.run.start import Start
from finetuner.training.evaluation import HeldOut
from finetuner.training.guards import Guards
from finetuner.training.loop import Run
from finetuner.training.optimizer import build_optimizer, own_rates


@dataclass(frozen=True)
class ReadyToTrain:
    """The model on its ranks. `run`: for the loop; `trained`: for checkpoints; `layout`: of rows in a batch."""

    run: Run
    trained: TrainedModel
    layout: BatchLayout
    num_trained: int
    num_parameters: int


def lay_over_ranks(session: Session, inputs: Inputs, start: Start, model: BuiltModel) -> ReadyToTrain:
    """Build the engine around the model, and find out what the model can do. Called by all ranks together.

    Raises ModelError for a model that cannot be trained as the recipe says.
    """
    recipe, plan, prepared = session.recipe, session.plan, inputs.prepared
    loss, accelerator, tokenizer = model.loss, start.accelerator, inputs.vocabulary.tokenizer
    rates = own_rates(trainable_parameters(loss), recipe.rates, start.schedule.peak_lr, model.table_names)
    request = EngineRequest(
        accelerator,
        loss,
        plan.parallel,
        full=not session.is_adapter,
        make_optimizer=lambda device: build_optimizer(
            trainable_parameters(loss), recipe.optimizer, device=device, rates=rates, vocabulary=model.table_names
        ),
        lazy=model.lazy,
    )
    engine = build_engine(request)
    packs = recipe.packing.sample_packing or packs_held_out(recipe.packing)
    composed = bool(engine.ask(lambda module: module.probe_head(packs=packs)))
    work = model.work if model.work is None or composed else model.work.with_head_everywhere()
    flat = wants_flat_packs(loss.unwrapped)

    def layout(*, packed: bool) -> BatchLayout:
        return layout_of(recipe.packing, recipe.data.sequence_len, packed=packed, flat=flat)

    held_out = HeldOut(
        rows=prepared.held_out_rows,
        layout=layout(packed=prepared.held_out_packs is not None),
        parts=prepared.held_out_ranges,
        token_bytes=token_bytes(tokenizer) if len(prepared.held_out_rows) else None,
    )
    # the table of data sheets is of 16-bit formats
    known_peak = peak_of(session.world.device_name) if plan.precision != "fp32" else None
    run = Run(
        accelerator=accelerator,
        engine=engine,
        objective=loss.objective,
        plan=plan,
        schedule=start.schedule,
        guards=Guards.from_section(recipe.guards, plan.precision, recipe.output.save_strategy),
        held_out=held_out,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        work=work,
        device_peak_flops=recipe.output.device_peak_flops or known_peak,
    )
    trained = TrainedModel(
        accelerator=accelerator,
        engine=engine,
        loss=loss,
        parameters=trainable_parameters(loss),
        tokenizer=tokenizer,
        is_adapter=session.is_adapter,
        token_ids=special_ids(recipe.tokenizer, tokenizer),
    )
    return ReadyToTrain(
        run, trained, layout(packed=recipe.packing.sample_packing), model.num_trained, model.num_parameters
    )
