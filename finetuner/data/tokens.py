"""Text and trained characters -> token ids and labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetuner.data.formats import Rendered, Span
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that is not trained on; transformers' and PyTorch's convention

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class TokenStore:
    """All documents, end to end: document i is ids[offsets[i]:offsets[i + 1]], its labels likewise (ids or IGNORE)."""

    ids: Ids
    labels: Ids
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, documents: Iterable[tuple[Ids, Ids]]) -> "TokenStore":
        pairs = list(documents)
        lengths = [len(ids) for ids, _ in pairs]
        empty = np.zeros(0, dtype=np.int32)
        return cls(
            ids=np.concatenate([ids for ids, _ in pairs]) if pairs else empty,
            labels=np.concatenate([labels for _, labels in pairs]) if pairs else empty,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> tuple[Ids, Ids]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.labels[part]

    def length(self, i: int) -> int:
        return int(self.offsets[i + 1] - self.offsets[i])

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Labels that a loss counts: the first token of a document has no position that predicts it."""
        counted = self.labels != IGNORE
        counted[self.offsets[:-1][np.diff(self.offsets) > 0]] = False
        return int(counted.sum())


def tokenize(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[Ids, Ids]]:
    """(ids, labels) of each text, in one batched call of a fast tokenizer.

    A token is trained on if all its characters are. A token that straddles the border of a span (a newline of the
    prompt merged with one of the answer) would be neither: such a text is cut at its borders and tokenised in pieces,
    which is also how the prompt is tokenised when the model is used.
    """
    encoded = tokenizer([r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True)
    empty = np.zeros(0, dtype=np.int32)
    begin, end = _wrapping_ids(tokenizer) if any(one.wraps for one in rendered) else (empty, empty)
    out = []
    for one, raw_ids, raw_offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids = np.array(raw_ids, dtype=np.int32)
        offsets = _widened(np.array(raw_offsets, dtype=np.int64).reshape(-1, 2), len(one.text))
        if _straddles(offsets, one.spans):
            ids, trained = _tokenize_pieces(one, tokenizer)
        else:
            trained = _inside(offsets, one.spans)
        if one.wraps:
            ids = np.concatenate([begin, ids, end])
            trained = np.concatenate([np.zeros(len(begin), bool), trained, np.ones(len(end), bool)])
        out.append((ids.astype(np.int32), np.where(trained, ids, IGNORE).astype(np.int32)))
    return out


def _widened(offsets: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """[start, stop) of each token, over the characters beside it that no token claims.

    Some tokenizers (GPT-NeoX's) leave a token's leading and trailing spaces out of its offsets. Whose they are is not
    said, so both neighbours get them: where it matters, at the border of a span, the text is then cut.
    """
    before = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))[:-1]
    after = np.concatenate([offsets[1:, 0], [length]])[: len(offsets)]
    return np.stack([np.minimum(offsets[:, 0], before), np.maximum(offsets[:, 1], after)], axis=1)


def _inside(offsets: NDArray[np.int64], spans: tuple[Span, ...]) -> NDArray[np.bool_]:
    if not spans:
        return np.zeros(len(offsets), dtype=bool)
    starts, stops = np.array(spans).T
    nearest = np.searchsorted(starts, offsets[:, 0], side="right") - 1  # the last span that begins at or before it
    return (nearest >= 0) & (offsets[:, 1] <= stops[nearest]) & (offsets[:, 1] > offsets[:, 0])


def _straddles(offsets: NDArray[np.int64], spans: tuple[Span, ...]) -> bool:
    borders = np.array([*sorted({border for span in spans for border in span}), np.iinfo(np.int64).max])
    following = borders[np.searchsorted(borders, offsets[:, 0], side="right")]
    return bool((following < offsets[:, 1]).any())


def _tokenize_pieces(one: Rendered, tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, NDArray[np.bool_]]:
    borders = sorted({0, len(one.text), *(border for span in one.spans for border in span)})
    pieces = [(a, b) for a, b in pairwise(borders) if a < b]
    encoded = tokenizer([one.text[a:b] for a, b in pieces], add_special_tokens=False)["input_ids"]
    trained = [np.full(len(ids), (a, b) in one.spans) for (a, b), ids in zip(pieces, encoded, strict=True)]
    return np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded]), np.concatenate(trained)


def _wrapping_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids]:
    """The begin-of-text the tokenizer itself would put first, if it does, and the end-of-text, which is trained on.

    Raises DataError if there is no end-of-text.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token, so a model trained with it would not learn where to stop.\n"
            "Name one: `special_tokens: {eos_token: ...}`."
        )
    own = tokenizer("a")["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and own[0] == tokenizer.bos_token_id else []
    return np.array(begin, dtype=np.int32), np.array([tokenizer.eos_token_id], dtype=np.int32)
