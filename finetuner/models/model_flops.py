"""FLOPs and parameters of a model, counted from its layers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from finetuner.models.four_bit_linear import FourBitLinear
from finetuner.plan.flops import TrainingFlops

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def training_flops(
    model: "PreTrainedModel | PeftModel", unwrapped: "PreTrainedModel", longest: int
) -> TrainingFlops | None:
    """Count the FLOPs of training, from the layers of a model that no engine has sharded yet.

    `unwrapped`: the transformers model without PEFT's wrapper; `longest`: tokens of the longest document.

    Returns None where the formulas of plan/flops.py do not hold: some weights are used for some tokens only (experts),
    something else than attention looks back, or attention looks less far back than `longest`.
    """
    config = unwrapped.config.get_text_config()
    if not _attends_fully(config, longest):
        return None
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | FourBitLinear)}
    if _has_other_matrices(model, layers.values()):
        return None
    head = unwrapped.get_output_embeddings()
    in_head = set(map(id, head.modules())) if head is not None else set()
    per_token = per_trained = 0.0
    for name, layer in layers.items():
        if name.endswith(".original_module"):  # PEFT's copy of the layer as it was, which computes nothing
            continue
        if id(layer) in in_head:
            per_trained += _flops_per_token(layer)
        else:
            per_token += _flops_per_token(layer)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TrainingFlops(per_token, per_trained, 6.0 * config.num_hidden_layers * width)


def _flops_per_token(layer: nn.Module) -> float:
    """6 a weight that is trained, 4 a frozen one: see plan/flops.py."""
    weight: Any = layer.weight
    size = layer.in_features * layer.out_features if isinstance(layer, FourBitLinear) else weight.numel()
    return size * (6.0 if weight.requires_grad else 4.0)


def _has_other_matrices(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Return whether some matrix is neither a linear layer's weight nor an embedding."""
    known = {id(layer.weight) for layer in layers}
    known |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return any(p.ndim > 1 and id(p) not in known for p in model.parameters())


def _attends_fully(config: Any, longest: int) -> bool:
    """Return whether every token of a document of `longest` tokens attends to all before it, in every layer."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds - {"full_attention", "sliding_attention"}:
        return False
    return window is None or longest <= window


def parameters_by_part(model: "PreTrainedModel") -> dict[str, int]:
    """Part of the model ("embedding", "MLPs") -> number of weights, under the names of plan/flops.py.

    A tied head counts as the embedding, and a 4-bit layer by the weights that it stands for."""
    tables = {id(p): "embedding" for p in model.get_input_embeddings().parameters()}
    head: Any = model.get_output_embeddings()
    tables = {id(p): "head" for p in head.parameters()} | tables if head is not None else tables
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, FourBitLinear)}
    parts = dict.fromkeys(("embedding", "attention", "MLPs", "norms", "head", "other"), 0)
    for name, parameter in model.named_parameters():
        part = tables.get(id(parameter)) or _part_named(name, is_vector=parameter.ndim < 2)
        parts[part] += packed.get(id(parameter), parameter.numel())
    return parts


def _part_named(name: str, *, is_vector: bool) -> str:
    if is_vector and ("norm" in name or ".ln_" in name):
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    return "MLPs" if "mlp" in name or "feed_forward" in name else "other"
