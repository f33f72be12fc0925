"""What a model that is there computes for a token, counted from its layers."""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from finetuner.models.four_bit_linear import FourBitLinear
from finetuner.plan.flops import Work

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def work_of(model: "PreTrainedModel | PeftModel", bare: "PreTrainedModel", longest: int) -> Work | None:
    """Before an engine spreads it. `bare`: the model without PEFT's wrapper; `longest`: tokens of the longest document.

    None where the formulas of flops.py do not hold: some weights are used for some tokens only (experts), something
    else than attention looks back, or attention looks less far back than `longest`.
    """
    config = bare.config.get_text_config()
    if not _attends_fully(config, longest):
        return None
    head = bare.get_output_embeddings()
    of_heads = set(map(id, head.modules())) if head is not None else set()
    body = of_head = 0.0
    counted: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D | FourBitLinear):
            continue
        weight: Any = module.weight
        counted.add(id(weight))
        if name.endswith(".original_module"):  # PEFT keeps it beside the copy that is trained
            continue
        size = module.in_features * module.out_features if isinstance(module, FourBitLinear) else weight.numel()
        flops = size * (6.0 if weight.requires_grad else 4.0)
        if id(module) in of_heads:
            of_head += flops
        else:
            body += flops
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if any(p.ndim > 1 and id(p) not in counted | tables for p in model.parameters()):
        return None
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 6.0 * config.num_hidden_layers * width
    return Work(body, of_head, attention)


def _attends_fully(config: Any, longest: int) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds - {"full_attention", "sliding_attention"}:
        return False
    return window is None or longest <= window


def parts_of(model: "PreTrainedModel") -> dict[str, int]:
    """Part -> weights, as flops.parts_of_shape names the parts; of a 4-bit layer those that it stands for."""
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
