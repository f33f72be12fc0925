"""The loss of a text, and what is read from it: perplexity and bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TextScore:
    """Summed loss in nats over `num_tokens` trained tokens, whose text has `num_bytes` bytes of UTF-8."""

    loss_sum: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """inf where exp would overflow a float: a loss like that means a broken model."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as the loss of a token is not."""
        return self.loss_sum / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def total(scores: Iterable[TextScore]) -> TextScore:
    found = list(scores)
    return TextScore(
        sum(one.loss_sum for one in found), sum(one.num_tokens for one in found), sum(one.num_bytes for one in found)
    )
