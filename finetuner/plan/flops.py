"""Model FLOPs, and the peaks of devices, of which a run reaches a share.

A weight w of a matrix takes part in one multiplication and one addition a token forward, and in two of each backward
(for its own gradient, and for that of its input): 6 FLOPs a token (arXiv:2001.08361, section 2.1), 4 if it is frozen.
Embeddings are looked up, not multiplied. Attention multiplies every query with the keys it sees, and the weights with
their values: for one head of width C and one pair of tokens 2 C + 2 C forward and twice that backward. Causal attention
sees T (T + 1) / 2 pairs of a document of T tokens, counted as T^2 / 2 here:

    FLOPs = 6 N t + 4 F t + 6 L D (sum of T^2 over the documents)

t tokens, N trained and F frozen weights of matrices, L layers, D = heads x C. Activations that are computed a second
time (gradient_checkpointing) do not count, nor does padding: what is stated is how fast the model learns, not how busy
the device is. That is the model FLOP utilization of arXiv:2204.02311, appendix B, but for attention, which is counted
there as if every token saw the whole row: twice as much.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetuner.recipe.gpt_shape import GPTShape

CHINCHILLA = 20  # tokens a parameter, about, that make the best of a given number of FLOPs (arXiv:2203.15556, table 3)

# FLOPs a second in bf16, dense, by the makers' data sheets, whose larger figures are for sparse matrices. Words of the
# device's name -> figure; of several that fit, the one with the most words.
_PEAKS: dict[tuple[str, ...], float] = {
    ("A10",): 125e12,
    ("A30",): 165e12,
    ("A100",): 312e12,
    ("L4",): 121e12,
    ("L40S",): 362e12,
    ("H100",): 989e12,  # SXM
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H200",): 989e12,
    ("H200", "NVL"): 835e12,
    ("B200",): 2250e12,
    ("RTX", "3090"): 71e12,
    ("RTX", "4090"): 165e12,
    ("MI250X",): 191.5e12,  # one of its two dies, each of which is a device
    ("MI300X",): 1307e12,
    ("MI325X",): 1307e12,
}


def known_devices() -> list[str]:
    """Return the names of devices whose data sheet is known."""
    return [" ".join(words) for words in _PEAKS]


def peak_of(device_name: str) -> float | None:
    """Return the FLOPs a second of a device by its maker's name, such as "NVIDIA H100 80GB HBM3".

    None where no data sheet is known.
    """
    apart = re.sub(r"(?i)\b(RTX)(?=\d)", r"\1 ", device_name)  # as people write it
    there = {word.lower() for word in re.split(r"[\s_-]+", apart)}
    fitting = [words for words in _PEAKS if {word.lower() for word in words} <= there]
    return _PEAKS[max(fitting, key=len)] if fitting else None


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of training, forward and backward: for each token, for each token that is predicted (the head), and for
    each pair of tokens of a document, T^2 of them."""

    per_token: float
    per_trained: float
    per_pair: float

    def flops(self, tokens: float, trained: float, pairs: float) -> float:
        """Return the FLOPs of so many tokens, predicted tokens, and pairs (T^2, summed over documents)."""
        return self.per_token * tokens + self.per_trained * trained + self.per_pair * pairs

    def with_head_everywhere(self) -> "TrainingFlops":
        """Return the work with the head computed for all tokens, also for those after which nothing is trained on."""
        return TrainingFlops(self.per_token + self.per_trained, 0.0, self.per_pair)

    def flops_of_rows(self, tokens: float, length: int) -> float:
        """Return the FLOPs of `tokens` in rows of `length`, each one document of which all is predicted."""
        return self.flops(tokens, tokens, tokens * length)


def training_flops_of_shape(shape: "GPTShape", vocabulary: int) -> TrainingFlops:
    """Return the work of a model from scratch, all of which is trained. `vocabulary`: rows of its embedding."""
    parts = parts_of_shape(shape, vocabulary)
    biases = shape.layers * _biases(shape) if shape.bias else 0
    matrices = parts["attention"] + parts["MLPs"] - biases
    return TrainingFlops(6.0 * matrices, 6.0 * shape.width * vocabulary, 6.0 * shape.layers * shape.width)


def parts_of_shape(shape: "GPTShape", vocabulary: int) -> dict[str, int]:
    """Return part -> number of parameters; a tied head is the embedding's matrix, and counts there."""
    width, norms = shape.width, 2 * shape.layers + 1
    narrow = width // shape.heads * shape.key_value_heads
    attention = 2 * width * width + 2 * width * narrow
    mlp = (3 if shape.activation == "swiglu" else 2) * width * shape.mlp_width
    of_mlp = _mlp_biases(shape) if shape.bias else 0
    of_attention = _biases(shape) - _mlp_biases(shape) if shape.bias else 0
    vectors = 2 if shape.norm == "layer" and shape.bias else 1
    return {
        "embedding": vocabulary * width,
        "positions": shape.context * width if shape.positions == "learned" else 0,
        "attention": shape.layers * (attention + of_attention),
        "MLPs": shape.layers * (mlp + of_mlp),
        "norms": norms * width * vectors,
        "head": 0 if shape.tie_embeddings else vocabulary * width,
    }


def _mlp_biases(shape: "GPTShape") -> int:
    """Return the number of biases in one layer's MLP."""
    return (2 if shape.activation == "swiglu" else 1) * shape.mlp_width + shape.width


def _biases(shape: "GPTShape") -> int:
    """Return the number of biases in one layer, attention and MLP."""
    return 2 * shape.width + 2 * (shape.width // shape.heads * shape.key_value_heads) + _mlp_biases(shape)
