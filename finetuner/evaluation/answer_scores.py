"""Exact match and F1 of short answers, as SQuAD's evaluation counts them (arXiv:1606.05250, section 6.1)."""

import re
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerScore:
    """Mean exact match and mean F1 of words (0 to 1) over `num_rows` questions."""

    exact_match: float
    f1: float
    num_rows: int


def score_answers(pairs: Iterable[tuple[str, str]]) -> AnswerScore:
    """Score pairs of (answer, reference)."""
    scores = [(float(normalized(a) == normalized(b)), f1(a, b)) for a, b in pairs]
    count = max(1, len(scores))
    return AnswerScore(sum(e for e, _ in scores) / count, sum(f for _, f in scores) / count, len(scores))


def normalized(text: str) -> str:
    """Return the text in lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, as bags; 1 where both have none."""
    left, right = normalized(answer).split(), normalized(reference).split()
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if common else 0.0
