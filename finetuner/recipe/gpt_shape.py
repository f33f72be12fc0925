"""The shape of a model from scratch, in plain numbers, from a `model:` block and its preset."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuner.recipe.optimizers import TrainedTensor

if TYPE_CHECKING:
    from finetuner.recipe.sections import GPTSection

FROM_SCRATCH = "from-scratch"  # base_model of a recipe with a `model:` block
MADE_TOKENIZERS = ("byte", "char")  # built without training: of the bytes, or of the characters of the rows

_LLAMA = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "rope_theta": 10_000.0}
_GPT2 = {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True, "context": 1024}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt-nano": {**_LLAMA, "layers": 4, "heads": 4, "width": 128, "context": 256},
    "gpt2-small": {**_GPT2, "layers": 12, "heads": 12, "width": 768},
    "gpt2-medium": {**_GPT2, "layers": 24, "heads": 16, "width": 1024},
    "gpt2-large": {**_GPT2, "layers": 36, "heads": 20, "width": 1280},
    # Llama 3.2's smallest
    "llama-1b": {
        **_LLAMA, "layers": 16, "heads": 32, "key_value_heads": 8, "width": 2048, "mlp_width": 8192, "context": 8192,
        "rope_theta": 500_000.0,
    },
}  # fmt: skip
NEEDED = ("layers", "heads", "width", "context")  # without a preset


@dataclass(frozen=True)
class GPTShape:
    """A shape with every choice made. `vocabulary`: rows of the embedding; None: as the tokenizer has tokens."""

    layers: int
    heads: int
    key_value_heads: int
    width: int
    mlp_width: int
    context: int
    vocabulary: int | None
    tie_embeddings: bool
    norm: str
    activation: str
    positions: str
    bias: bool
    dropout: float
    rope_theta: float


def choices_of(section: "GPTSection") -> Mapping[str, Any]:
    """Return the choices of the block's preset and of its other keys; a key wins over the preset."""
    preset: Mapping[str, Any] = PRESETS.get(section.preset, {}) if section.preset else {}
    return {**_LLAMA, **preset, **section.model_dump(exclude={"preset"}, exclude_none=True)}


def shape_of(section: "GPTSection") -> GPTShape:
    """Return the shape of a block that the rules have found complete.

    The width inside an MLP, if it is not given: 4 x width, and of swiglu, which has three matrices in place of two,
    two thirds of it (arXiv:2002.05202), up to the next multiple of 32.
    """
    choices = dict(choices_of(section))
    wide = 4 * choices["width"]
    usual = -(-2 * wide // (3 * 32)) * 32 if choices["activation"] == "swiglu" else wide
    return GPTShape(
        layers=choices["layers"],
        heads=choices["heads"],
        key_value_heads=choices.get("key_value_heads", choices["heads"]),
        width=choices["width"],
        mlp_width=choices.get("mlp_width", usual),
        context=choices["context"],
        vocabulary=choices.get("vocabulary"),
        tie_embeddings=choices.get("tie_embeddings", True),
        norm=choices["norm"],
        activation=choices["activation"],
        positions=choices["positions"],
        bias=choices["bias"],
        dropout=choices.get("dropout", 0.0),
        rope_theta=choices.get("rope_theta", _LLAMA["rope_theta"]),
    )


def tensors_of_shape(shape: GPTShape, vocabulary: int) -> list[TrainedTensor]:
    """Every weight tensor of a model from scratch, in no order; a tied head is the embedding's."""
    width, inner = shape.width, shape.mlp_width
    narrow = width // shape.heads * shape.key_value_heads
    matrices = [(width, width), (narrow, width), (narrow, width), (width, width), (inner, width), (width, inner)]
    matrices += [(inner, width)] * (shape.activation == "swiglu")
    norms = 2 if shape.norm == "layer" and shape.bias else 1  # a scale, and a bias where there is one
    of_layer: list[tuple[int, ...]] = [*matrices, *[(width,)] * (2 * norms)]
    if shape.bias:
        of_layer += [(outputs,) for outputs, _ in matrices]
    tables = [(vocabulary, width)] * (1 if shape.tie_embeddings else 2)
    tables += [(shape.context, width)] * (shape.positions == "learned")
    return [
        *(TrainedTensor(table, is_table=True) for table in tables),
        *(TrainedTensor(tensor) for tensor in of_layer * shape.layers),
        *(TrainedTensor((width,)) for _ in range(norms)),
    ]
