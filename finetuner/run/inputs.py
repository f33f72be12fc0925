"""The inputs of a run: its tokenizer, its rows as documents, and the folder of its base model."""

from dataclasses import dataclass

import torch

from finetuner.data.prepared_data import PreparedData
from finetuner.data.tokenized_rows import tokenize_rows
from finetuner.data.tokenizer import Vocabulary
from finetuner.estimate.fit import require_fit
from finetuner.models.attention import choose_attention
from finetuner.models.config_overrides import prepared_base, require_known_overrides
from finetuner.models.from_scratch import scratch_config, write_scratch_model
from finetuner.models.quant_format import choose_quant_format, require_bitsandbytes
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.run.session import Session


@dataclass(frozen=True)
class Inputs:
    """The data of a run, and its base. `base`: a folder or hub id; `attention`: kinds to try, the best first."""

    vocabulary: Vocabulary
    prepared: PreparedData
    base: str
    attention: tuple[str, ...]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document that is trained on; 0 of a stream."""
        return self.prepared.train.longest


def prepare_inputs(session: Session) -> Inputs:
    """Prepare the rows, and write the initial weights of a model from scratch.

    What is missing on this machine, and a model that cannot fit, is said before anything is fetched or prepared.
    """
    recipe, plan, world = session.recipe, session.plan, session.world
    attention = choose_attention(recipe.model.attn_implementation, world, plan.precision)
    if choose_quant_format(recipe.adapter.adapter, recipe.quantization, torch.float32) is not None:
        require_bitsandbytes()
    require_known_overrides(recipe.model)
    sections = (recipe.model, recipe.adapter, recipe.quantization, recipe.optimizer)
    from_scratch = recipe.model.base_model == FROM_SCRATCH  # its size is known with its vocabulary
    if not from_scratch:
        require_fit(*sections, plan, world, attention)
    rows = (recipe.model, recipe.tokenizer, recipe.data, recipe.packing)
    vocabulary, prepared = tokenize_rows(*rows, world=world, seed=plan.seed, screen=session.screen)
    base = prepared_base(recipe.model, recipe.data.dataset_prepared_path, world)
    if from_scratch:
        config = scratch_config(recipe.model.model, vocabulary.tokenizer)
        require_fit(*sections, plan, world, attention, config)
        base = write_scratch_model(config, recipe.data.dataset_prepared_path, plan.seed, world)
    return Inputs(vocabulary, prepared, base, attention)
