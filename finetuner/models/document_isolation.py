"""Test on the model itself whether it isolates the documents of a pack, since architectures differ."""

from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError
from finetuner.models.transformers_internals import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 8  # tokens of each of the two documents
MAX_LEAK = 0.01  # share of the change that a pack without isolation shows


def wants_flat_packs(model: "PreTrainedModel") -> bool:
    """Return whether packs have to be one long row: flash attention finds the borders of documents in its positions,
    and only there."""
    return "flash" in attention_implementation(model)


@torch.no_grad()
def require_isolation(model: "PreTrainedModel") -> None:
    """Raise ModelError unless a document's logits are the same whatever stands before it in its pack, and the same as
    where nothing does: at the start of a pack. (A row of its own would go through other kernels, and in bf16 through 30
    layers they differ by several percent.)

    Position ids start at 0 in each document and there is no attention mask: transformers' mask functions then make
    the attention block-diagonal (SDPA, eager) or call the variable-length kernel (flash). Models with an attention or
    a state of their own may do neither. "The same" is measured against what the document before it would change if
    the two were one.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocab = int(model.config.get_text_config().vocab_size)
    first, other, second = (
        (torch.arange(LENGTH, device=device) * step + step + 2).reshape(1, -1) % vocab for step in (1, 3, 5)
    )
    apart = torch.arange(LENGTH, device=device).repeat(2).reshape(1, -1)
    try:
        packed, changed = (_logits(model, torch.cat([a, second], dim=1), apart)[:, LENGTH:] for a in (first, other))
        leading = _logits(model, torch.cat([second, first], dim=1), apart)[:, :LENGTH]
    except TypeError as error:
        raise ModelError(_leaks(model, "takes no position_ids")) from error
    joined, joined_changed = (_logits(model, torch.cat([a, second], dim=1))[:, LENGTH:] for a in (first, other))
    model.train(was_training)
    influence = float((joined - joined_changed).abs().max())
    seen = max(float((packed - changed).abs().max()), float((packed - leading).abs().max()))
    rounding = 1e-5 if leading.dtype == torch.float32 else 2e-2
    allowed = max(MAX_LEAK * influence, rounding * float(leading.abs().max()) if seen < influence / 2 else 0.0)
    if seen > allowed:
        raise ModelError(_leaks(model, f"changes by {seen:.2g} with the document before it in the pack"))


def _logits(model: "PreTrainedModel", ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """ids, position_ids: (1, length) -> (1, length, vocabulary)."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return model(**inputs).logits


def _leaks(model: "PreTrainedModel", what: str) -> str:
    """The message for a model whose attention does `what`."""
    return (
        f"sample_packing needs attention that keeps documents apart, and {type(model).__name__} with "
        f"'{attention_implementation(model)}' attention {what}.\n"
        "Write `sample_packing: false` (`group_by_length: true` saves padding too), or choose another "
        "attn_implementation."
    )
