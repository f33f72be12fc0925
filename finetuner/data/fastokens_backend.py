"""Tokenize with fastokens: the ids that `tokenizers` gives for byte-level BPE, several times as fast.

fastokens gives no offsets. They are counted here: a byte-level token says how many bytes of text it stands for.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import is_normalized
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from finetuner.data.token_store import Ids
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Integers = NDArray[np.int64]

CHECK_EVERY = 64  # one text of so many is tokenized by `tokenizers` too, and compared


class FastEncoding(NamedTuple):
    """Tokens of texts, end to end.

    `ids`: (tokens,). `offsets`: (tokens, 2), the characters [start, stop) of a token in its own text. `counts`:
    (texts,), tokens of each. `is_complete`: (texts,), whether the tokens of a text stand for all of it; other texts
    must be tokenized by `tokenizers`.
    """

    ids: Ids
    offsets: Integers
    counts: Integers
    is_complete: NDArray[np.bool_]


class FastokensBackend:
    """A byte-level BPE tokenizer that is run by fastokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", compiled: "CompiledTokenizer") -> None:
        self.tokenizer, self.compiled = tokenizer, compiled
        backend: Any = tokenizer.backend_tokenizer
        self.normalizes = backend.normalizer is not None

    @classmethod
    def build(cls, tokenizer: "PreTrainedTokenizerBase") -> "FastokensBackend | None":
        """Return the backend of a tokenizer.

        None if fastokens is not installed, or the tokenizer is of a kind whose offsets cannot be counted here: no
        byte-level BPE, special tokens that swallow the space beside them, or offsets that leave spaces out.
        """
        try:
            from fastokens import Tokenizer
        except ImportError:
            return None
        if not _is_supported(tokenizer):
            return None
        _encode(tokenizer, [""])  # resets the truncation and padding that a tokenizer's file may ask for
        settings = tokenizer.backend_tokenizer.to_str()
        key = hashlib.sha256(settings.encode()).digest()
        compiled = _IN_USE.get(key)
        if compiled is None:
            try:
                compiled = CompiledTokenizer(Tokenizer.from_json_str(settings), _byte_widths(tokenizer))
            except ValueError:  # a component that fastokens does not know
                return None
            _IN_USE[key] = compiled
        return cls(tokenizer, compiled)

    def encode(self, texts: Sequence[str]) -> FastEncoding | None:
        """Tokenize texts; None if one of them is not Unicode.

        Raises DataError if fastokens and `tokenizers` disagree on one of the texts that are compared.
        """
        try:
            utf8 = [text.encode() for text in texts]
        except UnicodeEncodeError:  # an unpaired surrogate
            return None
        ids, borders = self._ids(texts)
        self._require_same_ids(texts, ids, borders)
        counts = np.diff(borders)
        num_bytes = np.fromiter(map(len, utf8), dtype=np.int64, count=len(utf8))
        widths = self.compiled.byte_widths[ids]
        stops = np.cumsum(widths)
        bytes_of_tokens = np.diff(np.append(0, stops)[borders])
        is_complete = bytes_of_tokens == num_bytes  # not where the vocabulary lacks a byte
        if self.normalizes:  # which may remove bytes in one place and add as many in another
            is_complete &= np.array([text.isascii() or is_normalized("NFC", text) for text in texts], dtype=bool)
        first_byte = np.repeat(np.append(0, np.cumsum(bytes_of_tokens))[:-1], counts)
        offsets = np.stack([stops - widths - first_byte, stops - first_byte], axis=1)
        num_characters = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        for i in np.flatnonzero(is_complete & (num_bytes != num_characters)):
            _count_characters(utf8[i], offsets[borders[i] : borders[i + 1]])
        return FastEncoding(ids, offsets, counts, is_complete)

    def _ids(self, texts: Sequence[str]) -> tuple[Ids, Integers]:
        ids, borders = self.compiled.fast.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype="<u4").astype(np.int32), np.frombuffer(borders, dtype="<u8").astype(np.int64)

    def _require_same_ids(self, texts: Sequence[str], ids: Ids, borders: Integers) -> None:
        """Raise DataError if `tokenizers` gives other ids for one text in CHECK_EVERY: training would see others."""
        checked = range(0, len(texts), CHECK_EVERY)
        for i, expected in zip(checked, _encode(self.tokenizer, [texts[i] for i in checked]), strict=True):
            found = ids[borders[i] : borders[i + 1]].tolist()
            if found != expected:
                same = (a == b for a, b in zip(found, expected, strict=False))
                at = next((n for n, is_same in enumerate(same) if not is_same), min(len(found), len(expected)))
                raise DataError(
                    f"fastokens and tokenizers read a text differently, from token {at} on: {found[at : at + 8]} and "
                    f"{expected[at : at + 8]}. It begins {texts[i][:80]!r}.\nfastokens is only for speed: go on "
                    "without it (`pip uninstall fastokens`), and please report it."
                )


def _count_characters(utf8: bytes, offsets: Integers) -> None:
    """Turn the byte offsets of a text's tokens, shape (tokens, 2), into character offsets, in place."""
    begins_character = (np.frombuffer(utf8, dtype=np.uint8) & 0xC0) != 0x80
    num_begun = np.cumsum(begins_character)  # characters that begin up to a byte; a token may hold only some bytes
    offsets[:, 0] = num_begun[offsets[:, 0]] - 1
    offsets[:, 1] = num_begun[offsets[:, 1] - 1]


class CompiledTokenizer:
    """The tables that are built from a tokenizer once, and shared by all sources of a mixture."""

    def __init__(self, fast: Any, byte_widths: Integers) -> None:
        """`fast`: a fastokens.Tokenizer, whose encode_batch_flat(texts) gives ids and borders as bytes. `byte_widths`:
        (vocabulary,), the bytes of text that each id stands for."""
        self.fast, self.byte_widths = fast, byte_widths


_IN_USE: "WeakValueDictionary[bytes, CompiledTokenizer]" = WeakValueDictionary()


def _byte_widths(tokenizer: "PreTrainedTokenizerBase") -> Integers:
    vocabulary = tokenizer.get_vocab()
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, i in vocabulary.items():
        widths[i] = len(token)  # a character of a byte-level token is a byte
    for i, added in tokenizer.added_tokens_decoder.items():
        widths[i] = len(added.content.encode())
    return widths


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=False)[
        "input_ids"
    ]


def _is_supported(tokenizer: "PreTrainedTokenizerBase") -> bool:
    backend: Any = tokenizer.backend_tokenizer
    return (
        _is_byte_bpe(backend.model)
        and _splits_as_fastokens(list(_components(backend.pre_tokenizer)))
        and all(component["type"] == "NFC" for component in _components(backend.normalizer))
        and not any(component.get("trim_offsets") for component in _components(backend.post_processor))
        and _finds_added_tokens_as_fastokens(tokenizer.added_tokens_decoder.values())
    )


def _is_byte_bpe(model: Any) -> bool:
    """Return whether a model of `tokenizers` is a BPE in which a character of a token is a byte of text."""
    from tokenizers import pre_tokenizers

    if type(model).__name__ != "BPE" or model.dropout or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    # an unknown byte would become a token whose width is not known
    return not model.unk_token or all(
        model.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet()
    )


def _splits_as_fastokens(pre_tokenizers: list[dict[str, Any]]) -> bool:
    if not pre_tokenizers or pre_tokenizers[-1]["type"] != "ByteLevel" or pre_tokenizers[-1]["add_prefix_space"]:
        return False
    if any(component["type"] not in ("Split", "Digits") for component in pre_tokenizers[:-1]):
        return False
    # \h is a hexadecimal digit to one program, and white space to the other
    return not any("\\h" in str(component.get("pattern")) for component in pre_tokenizers)


def _finds_added_tokens_as_fastokens(added: Iterable[Any]) -> bool:
    added = list(added)
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    # `tokenizers` looks for the unnormalized ones first and for the others in the rest, fastokens for the longest
    early, late = ([t.content for t in added if t.normalized is is_late] for is_late in (False, True))
    return not any(_can_overlap(one, other) for other in late for one in early)


def _can_overlap(one: str, other: str) -> bool:
    """Return whether a text could hold both tokens, with one beginning before the other ends."""
    if one in other or other in one:
        return True
    shared = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in shared)


def _components(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of a component of a tokenizer, or, if it is a sequence, of each of its members."""
    if component is None:
        return
    state = json.loads(component.__getstate__())
    lists = [state[key] for key in ("normalizers", "pretokenizers", "processors") if key in state]
    yield from chain.from_iterable(lists) if lists else [state]
