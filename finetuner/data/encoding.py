"""Encode rendered texts as token ids and labels, many texts at a time."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuner.data.fastokens_backend import FastokensBackend
from finetuner.data.formats.base import Rendered, Span
from finetuner.data.token_store import IGNORE_INDEX, Document, Ids, join_documents
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Places = NDArray[np.int64]  # characters, shape (n,), or [start, stop) of them, shape (n, 2)

# A token takes some 200 bytes until its text is done with, so not all texts of a batch are encoded at once.
CHARACTERS_AT_ONCE = 1 << 20
FAST_AFTER_CHARACTERS = 1 << 21  # fewer are encoded before fastokens would be ready


class Encoder:
    """A fast tokenizer, and the facts about its special tokens that every text needs."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, fast_after_characters: int = FAST_AFTER_CHARACTERS
    ) -> None:
        """`fast_after_characters`: build fastokens for the rest when so many characters have been encoded."""
        self.tokenizer, self.characters_until_fast = tokenizer, fast_after_characters
        size = max(tokenizer.get_vocab().values()) + 1
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.is_special = np.zeros(size, dtype=bool)
        # Characters of a special token's content; -1 if white space at its ends may be its own or its neighbor's.
        self.widths = np.full(size, -1, dtype=np.int64)
        for i, content in special.items():
            self.is_special[i] = True
            self.widths[i] = len(content) if content == content.strip() else -1

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Document]:
        """Return (ids, labels) of each text, both of shape (tokens,).

        A token is trained on if all its characters are. A token that straddles the border of a span (a newline of the
        prompt merged with one of the answer) would be neither: such a text is cut at that border and tokenized in
        pieces, which is also how the prompt is tokenized when the model is used. A row's own text that looks like a
        special token is cut out and tokenized as words, so that no row can end a turn or begin another.

        Raises DataError if a text is to be wrapped and there is no end-of-text.
        """
        return [document for document, _ in self.tokenize_and_mark(rendered)]

    def tokenize_and_mark(self, rendered: Sequence[Rendered]) -> list[tuple[Document, bool]]:
        """Return what `tokenize` does, and whether words that look like special tokens were cut out of each text."""
        return [marked for texts in _in_chunks(rendered) for marked in self._tokenize(texts)]

    def _tokenize(self, rendered: Sequence[Rendered]) -> Iterator[tuple[Document, bool]]:
        encoded = self._encode([one.text for one in rendered])
        spans = encoded.place_spans([one.spans for one in rendered])
        contents = encoded.place_spans([one.contents for one in rendered])
        words = _special_tokens_within(contents, encoded, self.is_special)
        cuts = np.unique(np.concatenate([_straddled_borders(spans, encoded), words.reshape(-1)]))
        cut_documents = self._tokenize_in_pieces(rendered, encoded, cuts, words) if len(cuts) else {}
        labels = np.where(_tokens_inside(encoded, spans), encoded.ids, IGNORE_INDEX).astype(np.int32)
        with_words = set((np.searchsorted(encoded.bases, words[:, 0], side="right") - 1).tolist())
        for i, (one, (start, stop)) in enumerate(zip(rendered, pairwise(encoded.borders.tolist()), strict=True)):
            document = cut_documents.get(i, (encoded.ids[start:stop], labels[start:stop]))
            # copies: a view would keep the arrays of all texts in memory
            made = self._wrap(document) if one.wraps else (document[0].copy(), document[1].copy())
            yield made, i in with_words

    def _wrap(self, document: Document) -> Document:
        begin, end = self._begin_and_end
        return join_documents([(begin, np.full_like(begin, IGNORE_INDEX)), document, (end, end)])

    @cached_property
    def ends(self) -> tuple[str | None, str | None]:
        """The begin-of-text that the tokenizer itself would put first, if it does, and the end-of-text, if it has one.

        These are put around a text that is to be wrapped.
        """
        tokenizer = self.tokenizer
        example = tokenizer("a")["input_ids"]
        has_begin = tokenizer.bos_token_id is not None and example[0] == tokenizer.bos_token_id
        return (tokenizer.bos_token if has_begin else None), tokenizer.eos_token

    @cached_property
    def _begin_and_end(self) -> tuple[Ids, Ids]:
        """The ids of `ends`, shape (0 or 1,) and (1,). Raises DataError if there is no end-of-text."""
        tokenizer = self.tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so a model trained with it would not learn where to stop.\n"
                "Name one: `special_tokens: {eos_token: ...}`."
            )
        begin = [] if self.ends[0] is None else [tokenizer.bos_token_id]
        return np.array(begin, dtype=np.int32), np.array([tokenizer.eos_token_id], dtype=np.int32)

    def _encode(self, texts: Sequence[str], *, as_words: bool = False) -> "_Encoded":
        """Encode texts, by fastokens if it is worth it. `as_words`: text like a special token is ordinary text."""
        if as_words or not self._is_worth_fastokens(texts) or self._fast is None:
            return self._encode_by_tokenizers(texts, as_words=as_words)
        encoding = self._fast.encode(texts)
        if encoding is None:
            return self._encode_by_tokenizers(texts)
        bases = _sums(_lengths(texts) + 1)[:-1]
        offsets = encoding.offsets + np.repeat(bases, encoding.counts)[:, None]
        encoded = _Encoded(encoding.ids, offsets, offsets, _sums(encoding.counts), bases)
        if encoding.is_complete.all():
            return encoded
        incomplete = np.flatnonzero(~encoding.is_complete)
        replacements = self._encode_by_tokenizers([texts[i] for i in incomplete.tolist()])
        return encoded.with_texts(incomplete, replacements)

    def _is_worth_fastokens(self, texts: Sequence[str]) -> bool:
        self.characters_until_fast -= sum(map(len, texts))
        return self.characters_until_fast < 0

    @cached_property
    def _fast(self) -> FastokensBackend | None:
        return FastokensBackend.build(self.tokenizer)

    def _encode_by_tokenizers(self, texts: Sequence[str], *, as_words: bool = False) -> "_Encoded":
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

        # A space between two tokens' offsets may belong to either, so `most` reaches from the end of the token before
        # to the start of the token after, and at the ends of a text to its first and last character.
        most = offsets.copy()
        most[1:, 0] = np.minimum(offsets[1:, 0], np.maximum.accumulate(offsets[:-1, 1]))
        most[:-1, 1] = np.maximum(offsets[:-1, 1], offsets[1:, 0])
        has_tokens = counts > 0
        most[borders[:-1][has_tokens], 0] = bases[has_tokens]
        last = borders[1:][has_tokens] - 1
        most[last, 1] = np.maximum(offsets[last, 1], (bases + lengths)[has_tokens])

        own, special = most.copy(), self.is_special[ids]
        is_exact = special & (offsets[:, 1] - offsets[:, 0] == self.widths[ids])
        own[is_exact] = offsets[is_exact]
        for i in np.flatnonzero(special & ~is_exact):  # it may have swallowed white space: that is not its own
            row = int(np.searchsorted(borders, i, side="right")) - 1
            start, stop = offsets[i]
            text = texts[row][start - bases[row] : stop - bases[row]]
            if text.strip():
                own[i] = stop - len(text.lstrip()), start + len(text.rstrip())
        return _Encoded(ids, own, most, borders, bases)

    def _tokenize_in_pieces(
        self, rendered: Sequence[Rendered], encoded: "_Encoded", cuts: Places, words: Places
    ) -> dict[int, Document]:
        """Return number of text -> its document, for the texts with cuts, each encoded piece by piece between them.

        `cuts`: (cuts,) characters. `words`: (n, 2), pieces that look like special tokens and are ordinary text.
        """
        text_of_cut = np.searchsorted(encoded.bases, cuts, side="right") - 1
        word_spans = {(start, stop) for start, stop in words.tolist()}
        pieces: list[_Piece] = []
        for row in np.unique(text_of_cut).tolist():
            one, base = rendered[row], int(encoded.bases[row])
            places = {0, *(cuts[text_of_cut == row] - base).tolist(), len(one.text)}
            for a, b in pairwise(sorted(places)):
                spans = [(max(start, a) - a, min(stop, b) - a) for start, stop in one.spans if start < b and stop > a]
                pieces.append(_Piece(row, a == 0, one.text[a:b], spans, (base + a, base + b) in word_spans))
        documents: dict[int, list[Document]] = {}
        for piece, document in zip(pieces, self._encode_pieces(pieces), strict=True):
            documents.setdefault(piece.row, []).append(document)
        return {row: join_documents(of_row) for row, of_row in documents.items()}

    def _encode_pieces(self, pieces: "list[_Piece]") -> list[Document]:
        # SentencePiece puts a space before a text, but not after a newline: so a piece within a text is encoded with a
        # newline before it, which is removed again.
        behind_newline = [i for i, piece in enumerate(pieces) if not piece.begins]
        encoded = self._encode_behind([i for i, piece in enumerate(pieces) if piece.begins], pieces, "")
        encoded |= self._encode_behind(behind_newline, pieces, "\n")
        merged = [i for i in behind_newline if i not in encoded]  # the newline became one token with the text
        encoded |= self._encode_behind(merged, pieces, "")
        return [encoded[i] for i in range(len(pieces))]

    def _encode_behind(self, numbers: list[int], pieces: "list[_Piece]", lead: str) -> dict[int, Document]:
        """Encode the pieces of these numbers with `lead` before each, whose tokens are removed.

        A piece whose first token holds a character of `lead` too is not in the result.
        """
        documents: dict[int, Document] = {}
        for as_words in (False, True):
            some = [i for i in numbers if pieces[i].as_words == as_words]
            if not some:
                continue
            encoded = self._encode([lead + pieces[i].text for i in some], as_words=as_words)
            starts = encoded.bases + len(lead)
            is_merged = _are_within(starts, encoded.most) & (len(lead) > 0)
            spans = [[(a + len(lead), b + len(lead)) for a, b in pieces[i].spans] for i in some]
            is_trained = _tokens_inside(encoded, encoded.place_spans(spans))
            labels = np.where(is_trained, encoded.ids, IGNORE_INDEX).astype(np.int32)
            is_of_piece = encoded.most[:, 0] >= np.repeat(starts, np.diff(encoded.borders))
            for i, merged, (start, stop) in zip(some, is_merged, pairwise(encoded.borders.tolist()), strict=True):
                if not merged:
                    chosen = is_of_piece[start:stop]
                    documents[i] = encoded.ids[start:stop][chosen], labels[start:stop][chosen]
        return documents


class _Piece(NamedTuple):
    """A section of text number `row` that is encoded by itself; `spans` of it are trained on.

    `begins`: it begins its text. `as_words`: what looks like a special token in it is ordinary text.
    """

    row: int
    begins: bool
    text: str
    spans: list[Span]
    as_words: bool


class _Encoded(NamedTuple):
    """Tokens of texts, end to end: those of text i are borders[i]:borders[i + 1].

    `ids`: (tokens,). `borders`: (texts + 1,). Characters are counted through all texts, with one between each: text i
    begins at bases[i], shape (texts,). `own` and `most`: (tokens, 2), characters [start, stop) that are certainly a
    token's own, and that may be. Some tokenizers (GPT-NeoX's) leave a token's leading and trailing spaces out of its
    offsets, so a space that no token claims may be of either neighbor. Some special tokens (Phi's) swallow the white
    space beside them.
    """

    ids: Ids
    own: Places
    most: Places
    borders: Places
    bases: Places

    def place_spans(self, spans: Sequence[Sequence[Span]]) -> Places:
        """Return the spans of every text, shape (n, 2), as characters counted through all texts."""
        counts = [len(of_text) for of_text in spans]
        flat = chain.from_iterable(chain.from_iterable(spans))
        places = np.fromiter(flat, dtype=np.int64, count=2 * sum(counts)).reshape(-1, 2)
        return places + np.repeat(self.bases, counts)[:, None]

    def with_texts(self, rows: Places, other: "_Encoded") -> "_Encoded":
        """Return a copy in which the tokens of text rows[i] are replaced by those of text i of `other`."""
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


def _in_chunks(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Yield the texts in lists of at most CHARACTERS_AT_ONCE characters, but at least one text."""
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


def _lengths(items: Sequence[Any]) -> Places:
    return np.fromiter(map(len, items), dtype=np.int64, count=len(items))


def _sums(values: Places) -> Places:
    """Return 0 and the cumulative sums, shape (n + 1,)."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])


def _tokens_inside(encoded: _Encoded, spans: Places) -> NDArray[np.bool_]:
    """Return a mask, shape (tokens,), of the tokens with characters of their own, all within one span."""
    starts, stops = spans.T
    nearest = np.searchsorted(starts, encoded.own[:, 0], side="right") - 1  # the last span that begins at or before it
    has_characters = encoded.own[:, 1] > encoded.own[:, 0]
    return has_characters & (nearest >= 0) & (encoded.own[:, 1] <= np.append(stops, 0)[nearest])


def _straddled_borders(spans: Places, encoded: _Encoded) -> Places:
    """Return the borders of spans, shape (n,), that lie within a token.

    At a span's end, white space that a special token may have swallowed does not count as the token's.
    """
    starts, stops = spans.T
    return np.concatenate([starts[_are_within(starts, encoded.most)], stops[_are_within(stops, encoded.own)]])


def _special_tokens_within(contents: Places, encoded: _Encoded, special: NDArray[np.bool_]) -> Places:
    """Return the characters, shape (n, 2), of special tokens that lie within a row's own text (`contents`)."""
    found = encoded.own[special[encoded.ids]]
    if not len(contents) or not len(found):
        return np.zeros((0, 2), dtype=np.int64)
    starts, stops = contents[np.lexsort((contents[:, 1], contents[:, 0]))].T
    reach = np.append(np.maximum.accumulate(stops), -1)  # index -1: a token that begins before all contents
    return found[found[:, 1] <= reach[np.searchsorted(starts, found[:, 0], side="right") - 1]]


def _are_within(places: Places, ranges: Places) -> NDArray[np.bool_]:
    """Return a mask, shape (places,), of the places strictly within a range of `ranges`, whose starts ascend."""
    reach = np.append(np.maximum.accumulate(ranges[:, 1]), -1)
    return reach[np.searchsorted(ranges[:, 0], places, side="left") - 1] > places
