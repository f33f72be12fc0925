"""Text and trained characters -> token ids and labels, many texts at a time."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuner.data.fastokens_backend import ByteLevel
from finetuner.data.formats import Rendered, Span
from finetuner.data.token_store import IGNORE, Document, Ids
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Places = NDArray[np.int64]  # characters, or [start, stop) of them: (n, 2)

# A token takes some 200 bytes until its text is done with, so it is not all texts of a batch that are encoded at once.
CHARACTERS_AT_ONCE = 1 << 20
FAST_AFTER = 1 << 21  # characters: fewer are tokenised before fastokens would be ready


class Encoder:
    """A fast tokenizer, with what is asked of it for every text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, fast_after: int = FAST_AFTER) -> None:
        """`fast_after`: so many characters go by before a faster library is made ready for the rest."""
        self.tokenizer, self.until_fast = tokenizer, fast_after
        size = max(tokenizer.get_vocab().values()) + 1
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.is_special = np.zeros(size, dtype=bool)
        self.widths = np.full(size, -1, dtype=np.int64)  # characters of a special token; -1: to be looked at
        for i, content in special.items():
            self.is_special[i] = True
            self.widths[i] = len(content) if content == content.strip() else -1

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Document]:
        """(ids, labels) of each text.

        A token is trained on if all its characters are. A token that straddles the border of a span (a newline of the
        prompt merged with one of the answer) would be neither: such a text is cut at that border and tokenised in
        pieces, which is also how the prompt is tokenised when the model is used. A row's own text that looks like a
        special token is cut out and tokenised as words, so that no row can end a turn or begin another.

        Raises DataError if a text is to be wrapped and there is no end-of-text.
        """
        return [document for some in _within_reach(rendered) for document in self._tokenize(some)]

    def _tokenize(self, rendered: Sequence[Rendered]) -> Iterator[Document]:
        encoded = self._encode([one.text for one in rendered])
        spans = encoded.placed([one.spans for one in rendered])
        contents = encoded.placed([one.contents for one in rendered])
        words = _special_in(contents, encoded, self.is_special)
        cuts = np.unique(np.concatenate([_straddled_borders(spans, encoded), words.reshape(-1)]))
        anew = self._in_pieces(rendered, encoded, cuts, words) if len(cuts) else {}
        labels = np.where(_inside(encoded, spans), encoded.ids, IGNORE).astype(np.int32)
        for i, (one, (start, stop)) in enumerate(zip(rendered, pairwise(encoded.borders.tolist()), strict=True)):
            document = anew[i] if i in anew else (encoded.ids[start:stop], labels[start:stop])
            yield self._wrapped(document) if one.wraps else (document[0].copy(), document[1].copy())

    def _wrapped(self, document: Document) -> Document:
        begin, end = self._wrapping
        return np.concatenate([begin, document[0], end]), np.concatenate(
            [np.full_like(begin, IGNORE), document[1], end]
        )

    @cached_property
    def _wrapping(self) -> tuple[Ids, Ids]:
        """The begin-of-text the tokenizer itself would put first, if it does, and the end-of-text, which is trained on.

        Raises DataError if there is no end-of-text.
        """
        tokenizer = self.tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so a model trained with it would not learn where to stop.\n"
                "Name one: `special_tokens: {eos_token: ...}`."
            )
        own = tokenizer("a")["input_ids"]
        begins = tokenizer.bos_token_id is not None and own[0] == tokenizer.bos_token_id
        begin = [tokenizer.bos_token_id] if begins else []
        return np.array(begin, dtype=np.int32), np.array([tokenizer.eos_token_id], dtype=np.int32)

    def _encode(self, texts: Sequence[str], *, as_words: bool = False) -> "_Encoded":
        """`as_words`: special tokens in the texts are text."""
        if as_words or not self._is_worth_building_for(texts) or self._fast is None:
            return self._by_tokenizers(texts, as_words=as_words)
        read = self._fast.read(texts)
        if read is None:
            return self._by_tokenizers(texts)
        bases = _sums(_lengths(texts) + 1)[:-1]
        offsets = read.offsets + np.repeat(bases, read.counts)[:, None]
        fast = _Encoded(read.ids, offsets, offsets, _sums(read.counts), bases)
        if read.is_whole.all():
            return fast
        rows = np.flatnonzero(~read.is_whole)
        return fast.with_texts(rows, self._by_tokenizers([texts[i] for i in rows.tolist()]))

    def _is_worth_building_for(self, texts: Sequence[str]) -> bool:
        self.until_fast -= sum(map(len, texts))
        return self.until_fast < 0

    @cached_property
    def _fast(self) -> ByteLevel | None:
        return ByteLevel.of(self.tokenizer)

    def _by_tokenizers(self, texts: Sequence[str], *, as_words: bool = False) -> "_Encoded":
        found = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=as_words,
        ).encodings
        assert found is not None, "a fast tokenizer"
        counts, lengths = _lengths(found), _lengths(texts)
        borders, bases = _sums(counts), _sums(lengths + 1)[:-1]
        ids = np.fromiter(chain.from_iterable(one.ids for one in found), dtype=np.int32, count=borders[-1])
        flat = chain.from_iterable(chain.from_iterable(one.offsets for one in found))
        offsets = np.fromiter(flat, dtype=np.int64, count=2 * borders[-1]).reshape(-1, 2)
        offsets += np.repeat(bases, counts)[:, None]

        most = offsets.copy()
        most[1:, 0] = np.minimum(offsets[1:, 0], np.maximum.accumulate(offsets[:-1, 1]))
        most[:-1, 1] = np.maximum(offsets[:-1, 1], offsets[1:, 0])
        some = counts > 0
        most[borders[:-1][some], 0] = bases[some]
        last = borders[1:][some] - 1
        most[last, 1] = np.maximum(offsets[last, 1], (bases + lengths)[some])

        own, special = most.copy(), self.is_special[ids]
        plain = special & (offsets[:, 1] - offsets[:, 0] == self.widths[ids])
        own[plain] = offsets[plain]
        for i in np.flatnonzero(special & ~plain):
            row = int(np.searchsorted(borders, i, side="right")) - 1
            start, stop = offsets[i]
            text = texts[row][start - bases[row] : stop - bases[row]]
            if text.strip():
                own[i] = stop - len(text.lstrip()), start + len(text.rstrip())
        return _Encoded(ids, own, most, borders, bases)

    def _in_pieces(
        self, rendered: Sequence[Rendered], encoded: "_Encoded", cuts: Places, words: Places
    ) -> dict[int, Document]:
        """The texts with cuts, each encoded as what lies between them; `words` are not special tokens, whatever they
        look like."""
        rows = np.searchsorted(encoded.bases, cuts, side="right") - 1
        as_words = {(start, stop) for start, stop in words.tolist()}
        pieces: list[_Piece] = []
        for row in np.unique(rows).tolist():
            one, base = rendered[row], int(encoded.bases[row])
            places = {0, *(cuts[rows == row] - base).tolist(), len(one.text)}
            for a, b in pairwise(sorted(places)):
                spans = [(max(start, a) - a, min(stop, b) - a) for start, stop in one.spans if start < b and stop > a]
                pieces.append(_Piece(row, a == 0, one.text[a:b], spans, (base + a, base + b) in as_words))
        parts: dict[int, list[Document]] = {}
        for piece, document in zip(pieces, self._encode_pieces(pieces), strict=True):
            parts.setdefault(piece.row, []).append(document)
        return {
            row: (np.concatenate([ids for ids, _ in some]), np.concatenate([labels for _, labels in some]))
            for row, some in parts.items()
        }

    def _encode_pieces(self, pieces: "list[_Piece]") -> list[Document]:
        out: dict[int, Document] = {}
        # SentencePiece begins a text with a space, unless behind a newline.
        leads = {i: "" if piece.begins else "\n" for i, piece in enumerate(pieces)}
        while leads:
            again: dict[int, str] = {}
            for as_words in (False, True):
                some = [i for i in leads if pieces[i].as_words == as_words]
                if not some:
                    continue
                encoded = self._encode([leads[i] + pieces[i].text for i in some], as_words=as_words)
                shifts = np.array([len(leads[i]) for i in some], dtype=np.int64)
                merged = _are_within(encoded.bases + shifts, encoded.most) & (shifts > 0)
                spans = [[(a + len(leads[i]), b + len(leads[i])) for a, b in pieces[i].spans] for i in some]
                labels = np.where(_inside(encoded, encoded.placed(spans)), encoded.ids, IGNORE).astype(np.int32)
                kept = encoded.most[:, 0] >= np.repeat(encoded.bases + shifts, np.diff(encoded.borders))
                for i, is_merged, (start, stop) in zip(some, merged, pairwise(encoded.borders.tolist()), strict=True):
                    if is_merged:  # the newline became one token with what follows it
                        again[i] = ""
                    else:
                        its = kept[start:stop]
                        out[i] = encoded.ids[start:stop][its], labels[start:stop][its]
            leads = again
        return [out[i] for i in range(len(pieces))]


class _Piece(NamedTuple):
    """A part of a text that is encoded by itself; `spans` of it are trained on."""

    row: int
    begins: bool
    text: str
    spans: list[Span]
    as_words: bool


class _Encoded(NamedTuple):
    """Tokens of texts, end to end: those of text i are borders[i]:borders[i + 1]. Characters are counted through all
    texts, with one between each: text i begins at bases[i].

    The characters [start, stop) of a token: `own` are surely its own, `most` may be. Some tokenizers (GPT-NeoX's) leave
    a token's leading and trailing spaces out of its offsets, so a space that no token claims may be of either
    neighbour. Some special tokens (Phi's) swallow the white space beside them.
    """

    ids: Ids
    own: Places
    most: Places
    borders: Places
    bases: Places

    def placed(self, spans: Sequence[Sequence[Span]]) -> Places:
        """(n, 2): those of each text, where they stand among all."""
        counts = [len(some) for some in spans]
        flat = chain.from_iterable(chain.from_iterable(spans))
        places = np.fromiter(flat, dtype=np.int64, count=2 * sum(counts)).reshape(-1, 2)
        return places + np.repeat(self.bases, counts)[:, None]

    def with_texts(self, rows: Places, other: "_Encoded") -> "_Encoded":
        """The same, with the tokens that `other` has of text 0, 1, ... for those of text rows[0], rows[1], ..."""
        counts = np.diff(self.borders)
        is_theirs = np.zeros(len(counts), dtype=bool)
        is_theirs[rows] = True
        mine = np.repeat(~is_theirs, counts)
        counts[rows] = np.diff(other.borders)
        theirs = np.repeat(is_theirs, counts)
        shifts = np.repeat(self.bases[rows] - other.bases, np.diff(other.borders))[:, None]

        def joined(own: NDArray[Any], its: NDArray[Any]) -> NDArray[Any]:
            column = np.empty((len(theirs), *own.shape[1:]), dtype=own.dtype)
            column[~theirs], column[theirs] = own[mine], its
            return column

        own, most = joined(self.own, other.own + shifts), joined(self.most, other.most + shifts)
        return _Encoded(joined(self.ids, other.ids), own, most, _sums(counts), self.bases)


def _within_reach(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """The texts, as many at a time as can be encoded at once."""
    some: list[Rendered] = []
    size = 0
    for one in rendered:
        if some and size + len(one.text) > CHARACTERS_AT_ONCE:
            yield some
            some, size = [], 0
        some.append(one)
        size += len(one.text)
    if some:
        yield some


def _lengths(some: Sequence[Any]) -> Places:
    return np.fromiter(map(len, some), dtype=np.int64, count=len(some))


def _sums(values: Places) -> Places:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])


def _inside(encoded: _Encoded, spans: Places) -> NDArray[np.bool_]:
    starts, stops = spans.T
    nearest = np.searchsorted(starts, encoded.own[:, 0], side="right") - 1  # the last span that begins at or before it
    has_characters = encoded.own[:, 1] > encoded.own[:, 0]
    return has_characters & (nearest >= 0) & (encoded.own[:, 1] <= np.append(stops, 0)[nearest])


def _straddled_borders(spans: Places, encoded: _Encoded) -> Places:
    """Where a trained span begins or ends within a token. White space that the token at its end swallows is not its."""
    starts, stops = spans.T
    return np.concatenate([starts[_are_within(starts, encoded.most)], stops[_are_within(stops, encoded.own)]])


def _special_in(contents: Places, encoded: _Encoded, special: NDArray[np.bool_]) -> Places:
    """Where special tokens stand within a row's own text."""
    found = encoded.own[special[encoded.ids]]
    if not len(contents) or not len(found):
        return np.zeros((0, 2), dtype=np.int64)
    starts, stops = contents[np.lexsort((contents[:, 1], contents[:, 0]))].T
    reach = np.append(np.maximum.accumulate(stops), -1)  # the last: for what begins before all
    return found[found[:, 1] <= reach[np.searchsorted(starts, found[:, 0], side="right") - 1]]


def _are_within(places: Places, ranges: Places) -> NDArray[np.bool_]:
    """Which of the places lie within one of the ranges, whose beginnings ascend."""
    reach = np.append(np.maximum.accumulate(ranges[:, 1]), -1)
    return reach[np.searchsorted(ranges[:, 0], places, side="left") - 1] > places
