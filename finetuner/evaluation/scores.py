"""What a model is measured by: loss on held-out tokens, and answers as SQuAD scores them."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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


@dataclass(frozen=True)
class AnswerScore:
    """Shares of 1 over `num_rows` questions: answers that are the same, and the mean overlap of words."""

    exact_match: float
    f1: float
    num_rows: int


def total(scores: Iterable[TextScore]) -> TextScore:
    found = list(scores)
    return TextScore(
        sum(one.loss_sum for one in found), sum(one.num_tokens for one in found), sum(one.num_bytes for one in found)
    )


def score_answers(pairs: Iterable[tuple[str, str]]) -> AnswerScore:
    """Of (answer, reference)."""
    scores = [(float(normalised(a) == normalised(b)), f1(a, b)) for a, b in pairs]
    count = max(1, len(scores))
    return AnswerScore(sum(e for e, _ in scores) / count, sum(f for _, f in scores) / count, len(scores))


def normalised(text: str) -> str:
    """As SQuAD's evaluation compares answers (arXiv:1606.05250, section 6.1): lower case, without punctuation and
    articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, as bags; 1 where both have none."""
    left, right = normalised(answer).split(), normalised(reference).split()
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if common else 0.0
