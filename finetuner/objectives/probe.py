"""Try a model out before it is trained: can its head be composed, does it keep documents apart?"""

from typing import TYPE_CHECKING

import torch

from finetuner.models.document_isolation import require_isolation
from finetuner.objectives.next_token import head_is_composable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def probe(model: "PreTrainedModel", *, packs: bool) -> bool:
    """Whether the loss head can be composed. Raises ModelError for a model that cannot be trained like this."""
    composed = head_is_composable(model)
    if packs:
        require_isolation(model)
    return composed
