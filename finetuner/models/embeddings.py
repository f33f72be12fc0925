"""Embedding and head of a model: the tables with a row for each token."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetuner.storage.safetensors_stream import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def grow_embeddings(model: "PreTrainedModel", vocab_size: int) -> int:
    """Give every token id a row, new rows being the mean of the old ones; return the number of rows added.

    The mean makes a new token neither likely nor unlikely (arXiv:2111.07408 motivates it). Nothing is drawn, so that
    all ranks and every later start of the run have the same rows.
    """
    embedding = _weight(model.get_input_embeddings())
    old = embedding.shape[0]
    if vocab_size <= old:
        return 0
    means = [_weight(m).detach().float().mean(dim=0) for m in _vocabulary_modules(model)]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for module, mean in zip(_vocabulary_modules(model), means, strict=True):
        with torch.no_grad():
            _weight(module)[old:] = mean
    return vocab_size - old


def rows_for_tokens(num_tokens: int, *, to_32x: bool) -> int:
    """Count the rows that a table of so many tokens has at least: with `to_32x` up to the next multiple of 32."""
    return -(-num_tokens // 32) * 32 if to_32x else num_tokens


def grow_for_adapter(model: "PreTrainedModel", adapter: Path, num_tokens: int) -> None:
    """Grow a base to the rows that an adapter was trained on: of its tokens, or of the tables that it has in full."""
    tables = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    names = tuple(f".{name}.weight" for name, m in model.named_modules() if any(m is table for table in tables))
    weights = adapter / "adapter_model.safetensors"
    in_full = read_header(weights) if weights.exists() else {}
    grow_embeddings(model, max([num_tokens, *(info.shape[0] for key, info in in_full.items() if key.endswith(names))]))


def embedding_rows(model: "PreTrainedModel") -> int:
    """Number of token ids that the input embedding has a row for."""
    return _weight(model.get_input_embeddings()).shape[0]


def is_tied(model: "PreTrainedModel") -> bool:
    """Return whether the output head is the embedding's tensor."""
    head = model.get_output_embeddings()
    return head is not None and _weight(head) is _weight(model.get_input_embeddings())


def vocabulary_parameters(module: nn.Module, model: "PreTrainedModel") -> frozenset[str]:
    """Names, within `module`, of the parameters with a row for each token or position.

    They are the embeddings and the head of the `model` in it, wrapped by PEFT or not.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    inside = [
        name for name, m in module.named_modules() if isinstance(m, nn.Embedding) or any(m is table for table in tables)
    ]
    return frozenset(n for n, _ in module.named_parameters() if any(n.startswith(f"{name}.") for name in inside))


def _vocabulary_modules(model: "PreTrainedModel") -> list[nn.Module]:
    """The embedding, and the head unless it is the same tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None or is_tied(model) else [embedding, head]


def _weight(module: nn.Module) -> torch.Tensor:
    """(vocabulary, width)."""
    weight: Any = module.weight
    return weight
