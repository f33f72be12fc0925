"""The longest row that a model was made for."""

from typing import TYPE_CHECKING

from torch import nn

from finetuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLES_OF_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


def context_length(model: "PreTrainedModel") -> int | None:
    """Return the number of tokens in the longest row that a model was made for, or None if its config has none."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def length_notes(model: "PreTrainedModel", longest: int) -> list[str]:
    """Return notes for the user on rows of `longest` tokens, beyond those that a model was made for.

    Raises ModelError for a model with a table of positions, which has no more than it has.
    """
    limit = context_length(model)
    if limit is None or longest <= limit:
        return []
    if any(isinstance(m, nn.Embedding) and name.endswith(TABLES_OF_POSITIONS) for name, m in model.named_modules()):
        raise ModelError(
            f"the longest row has {longest} tokens, and the model has positions for {limit}.\n"
            f"Write `sequence_len: {limit}`."
        )
    return [f"the longest row has {longest:,} tokens; the model was made for {limit:,} (max_position_embeddings)"]
