"""Text and trained characters -> token ids and labels."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetuner.data.formats import Rendered, Span, cell_of
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that is not trained on; transformers' and PyTorch's convention

Ids = NDArray[np.int32]


class Rows(Protocol):
    """What batches are made of: documents (TokenStore), or packs of them (Packs)."""

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def length(self, i: int) -> int:
        """Tokens of row i."""

    def documents(self, i: int) -> list[tuple[Ids, Ids]]:
        """(ids, labels) of each document in row i."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of all rows, in tokens."""

    @property
    def sha256(self) -> str:
        """Equal only if the same is learned from the same rows."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """All documents, end to end: document i is ids[offsets[i]:offsets[i + 1]], its labels likewise (ids or IGNORE).

    `digest` and `trained` are those of a store that was read from disk, where counting would read it all.
    """

    ids: Ids
    labels: Ids
    offsets: NDArray[np.int64]
    digest: str | None = None
    trained: int | None = None

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

    def documents(self, i: int) -> list[tuple[Ids, Ids]]:
        return [self.document(i)]

    def length(self, i: int) -> int:
        return int(self.offsets[i + 1] - self.offsets[i])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 if there is none."""
        return int(self.lengths.max(initial=0))

    @property
    def sha256(self) -> str:
        """Of all ids, labels and borders: equal only if the same is learned."""
        if self.digest is not None:
            return self.digest
        return joined_digest(*(hashlib.sha256(part.tobytes()) for part in (self.ids, self.labels, self.offsets)))

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Labels that a loss counts: the first token of a document has no position that predicts it."""
        if self.trained is not None:
            return self.trained
        counted = self.labels != IGNORE
        counted[self.offsets[:-1][np.diff(self.offsets) > 0]] = False
        return int(counted.sum())


def joined_digest(*parts: "hashlib._Hash") -> str:
    """One digest of several."""
    return hashlib.sha256("".join(part.hexdigest() for part in parts).encode()).hexdigest()


def read_tokens(row: Mapping[str, Any], vocab_size: int) -> tuple[Ids, Ids]:
    """(ids, labels) of a row that is tokenised already: columns input_ids and labels, and attention_mask if there is
    padding, which is left out. Raises DataError if they are not token ids of this vocabulary, or differ in length."""
    columns = []
    for name in ("input_ids", "labels"):
        cell = cell_of(row, name)
        try:
            columns.append(np.array(cell, dtype=np.int64).reshape(-1))
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"column '{name}' must be a list of token ids; it is {cell!r:.60}") from None
    ids, labels = columns
    mask = row.get("attention_mask")
    kept = np.ones(len(ids), dtype=bool) if mask is None else np.array(mask, dtype=bool)
    if not len(ids) == len(labels) == len(kept):
        raise DataError(f"{len(ids)} input_ids, {len(labels)} labels and {len(kept)} attention_mask must be equal many")
    ids, labels = ids[kept], labels[kept]
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise DataError(f"input_ids has {wrong[0]}, but the tokenizer's ids are 0 to {vocab_size - 1}")
    strange = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))]
    if len(strange):
        raise DataError(f"labels has {strange[0]}, but must be token ids, or {IGNORE} where nothing is learned")
    return ids.astype(np.int32), labels.astype(np.int32)


def tokenize(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[Ids, Ids]]:
    """(ids, labels) of each text, in one batched call of a fast tokenizer.

    A token is trained on if all its characters are. A token that straddles the border of a span (a newline of the
    prompt merged with one of the answer) would be neither: such a text is cut at that border and tokenised in pieces,
    which is also how the prompt is tokenised when the model is used. A row's own text that looks like a special token
    is cut out and tokenised as words, so that no row can end a turn or begin another.
    """
    if not rendered:
        return []
    empty = np.zeros(0, dtype=np.int32)
    begin, end = _wrapping_ids(tokenizer) if any(one.wraps for one in rendered) else (empty, empty)
    special = _specials(tokenizer)
    out = []
    for one, encoded in zip(rendered, _encode([r.text for r in rendered], tokenizer), strict=True):
        words = _special_in(one.contents, encoded, special)
        cuts = sorted({*_straddled_borders(one.spans, encoded), *(place for word in words for place in word)})
        if cuts:
            ids, trained = _tokenize_pieces(one, cuts, words, tokenizer)
        else:
            ids, trained = encoded.ids, _inside(encoded, one.spans)
        if one.wraps:
            ids = np.concatenate([begin, ids, end])
            trained = np.concatenate([np.zeros(len(begin), bool), trained, np.ones(len(end), bool)])
        out.append((ids.astype(np.int32), np.where(trained, ids, IGNORE).astype(np.int32)))
    return out


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a text, and the characters [start, stop) of each: `own` are surely its own, `most` may be.

    Some tokenizers (GPT-NeoX's) leave a token's leading and trailing spaces out of its offsets, so a space that no
    token claims may be of either neighbour. Some special tokens (Phi's) swallow the white space beside them.
    """

    ids: Ids
    own: NDArray[np.int64]
    most: NDArray[np.int64]


def _specials(tokenizer: "PreTrainedTokenizerBase") -> NDArray[np.bool_]:
    """For each id, whether it is a special token."""
    table = np.zeros(len(tokenizer) + 1, dtype=bool)
    table[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < len(table)]] = True
    return table


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, as_words: bool = False
) -> Iterator[_Encoded]:
    """`as_words`: special tokens in the text are text."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=as_words,
    )
    special = _specials(tokenizer)
    for text, raw_ids, raw_offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids = np.array(raw_ids, dtype=np.int32)
        offsets = np.fromiter(chain.from_iterable(raw_offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
        most = offsets.copy()
        if len(ids):
            reach = np.maximum.accumulate(offsets[:-1, 1])
            most[1:, 0] = np.minimum(offsets[1:, 0], reach)
            most[:-1, 1] = np.maximum(offsets[:-1, 1], offsets[1:, 0])
            most[0, 0], most[-1, 1] = min(int(offsets[0, 0]), 0), max(int(offsets[-1, 1]), len(text))
        own = most.copy()
        for i in np.flatnonzero(special[ids]):
            start, stop = offsets[i]
            if text[start:stop].strip():
                own[i] = stop - len(text[start:stop].lstrip()), start + len(text[start:stop].rstrip())
        yield _Encoded(ids, own, most)


def _inside(encoded: _Encoded, spans: tuple[Span, ...]) -> NDArray[np.bool_]:
    starts, stops = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    nearest = np.searchsorted(starts, encoded.own[:, 0], side="right") - 1  # the last span that begins at or before it
    has_characters = encoded.own[:, 1] > encoded.own[:, 0]
    return has_characters & (nearest >= 0) & (encoded.own[:, 1] <= np.append(stops, 0)[nearest])


def _straddled_borders(spans: tuple[Span, ...], encoded: _Encoded) -> list[int]:
    """Where a trained span begins or ends within a token. White space that the token at its end swallows is not its."""
    places = np.array(spans, dtype=np.int64).reshape(-1, 2)
    starts = places[:, 0][_are_within(places[:, 0], encoded.most)]
    stops = places[:, 1][_are_within(places[:, 1], encoded.own)]
    return sorted({*starts.tolist(), *stops.tolist()})


def _special_in(contents: tuple[Span, ...], encoded: _Encoded, special: NDArray[np.bool_]) -> list[Span]:
    """Where special tokens stand within a row's own text."""
    found = encoded.own[special[encoded.ids]]
    if not contents or not len(found):
        return []
    starts, stops = np.array(sorted(contents), dtype=np.int64).T
    reach = np.append(np.maximum.accumulate(stops), -1)  # the last: for what begins before all
    inside = found[:, 1] <= reach[np.searchsorted(starts, found[:, 0], side="right") - 1]
    return [(int(a), int(b)) for a, b in found[inside]]


def _are_within(places: NDArray[np.int64], ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the places lie within one of the ranges, whose beginnings ascend."""
    reach = np.append(np.maximum.accumulate(ranges[:, 1]), -1)
    return reach[np.searchsorted(ranges[:, 0], places, side="left") - 1] > places


def _tokenize_pieces(
    one: Rendered, cuts: list[int], words: list[Span], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Ids, NDArray[np.bool_]]:
    """Encode what lies between the cuts; `words` are not special tokens, whatever they look like."""
    ids, trained = [], []
    for a, b in pairwise(sorted({0, *cuts, len(one.text)})):
        as_words = (a, b) in words
        if a:
            piece = _encode_within(one.text[a:b], tokenizer, as_words=as_words)
        else:
            piece = next(_encode([one.text[:b]], tokenizer, as_words=as_words))
        spans = tuple((max(start, a) - a, min(stop, b) - a) for start, stop in one.spans if start < b and stop > a)
        ids.append(piece.ids)
        trained.append(_inside(piece, spans))
    return np.concatenate(ids), np.concatenate(trained)


def _encode_within(text: str, tokenizer: "PreTrainedTokenizerBase", *, as_words: bool) -> _Encoded:
    """Encode what does not begin a text. SentencePiece begins a text with a space, unless behind a newline."""
    (behind,) = _encode(["\n" + text], tokenizer, as_words=as_words)
    if _are_within(np.array([1]), behind.most).any():  # the newline became one token with what follows it
        return next(_encode([text], tokenizer, as_words=as_words))
    rest = behind.most[:, 0] >= 1
    return _Encoded(behind.ids[rest], behind.own[rest] - 1, behind.most[rest] - 1)


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
