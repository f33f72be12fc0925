"""Byte-level BPE through fastokens: the ids that `tokenizers` gives, several times as fast.

It gives no offsets. They are counted: a byte-level token says how many bytes of text it stands for.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
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

Numbers = NDArray[np.int64]

CHECKED = 64  # one text of so many is read by `tokenizers` too


class Read(NamedTuple):
    """Tokens of texts, end to end: of text i `counts[i]`, with the characters [start, stop) of their text. `is_whole`:
    the tokens of text i are all of it; the others' are to be asked of `tokenizers`."""

    ids: Ids
    offsets: Numbers  # (n, 2)
    counts: Numbers
    is_whole: NDArray[np.bool_]


class ByteLevel:
    """A byte-level BPE tokenizer by fastokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", loaded: "LoadedTokenizer") -> None:
        self.tokenizer, self.loaded = tokenizer, loaded
        backend: Any = tokenizer.backend_tokenizer
        self.normalizes = backend.normalizer is not None

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ByteLevel | None":
        """None if fastokens is not installed, or the tokenizer is of a kind that is not read here: no byte-level BPE,
        with special tokens that swallow the space beside them, or with offsets that leave spaces out."""
        try:
            from fastokens import Tokenizer
        except ImportError:
            return None
        if not _is_plain(tokenizer):
            return None
        _ids_of(tokenizer, [""])  # a tokenizer's file may say that it cuts and fills up texts, until it is called
        settings = tokenizer.backend_tokenizer.to_str()
        key = hashlib.sha256(settings.encode()).digest()
        loaded = _IN_USE.get(key)
        if loaded is None:
            try:
                loaded = _IN_USE[key] = LoadedTokenizer(Tokenizer.from_json_str(settings), _widths(tokenizer))
            except ValueError:  # a part of the tokenizer that it does not know
                return None
        return cls(tokenizer, loaded)

    def read(self, texts: Sequence[str]) -> Read | None:
        """None for texts that are not Unicode. Raises DataError if fastokens and `tokenizers` disagree on one."""
        try:
            coded = [text.encode() for text in texts]
        except UnicodeEncodeError:  # half of a surrogate pair
            return None
        ids, borders = self._ids(texts)
        self._check(texts, ids, borders)
        counts = np.diff(borders)
        sizes = np.fromiter(map(len, coded), dtype=np.int64, count=len(coded))
        widths = self.loaded.widths[ids]
        stops = np.cumsum(widths)
        found = np.diff(np.append(0, stops)[borders])
        is_whole = found == sizes  # not where the vocabulary lacks a byte
        if self.normalizes:  # which may take bytes here and give them back there
            is_whole &= np.array([text.isascii() or is_normalized("NFC", text) for text in texts], dtype=bool)
        first = np.repeat(np.append(0, np.cumsum(found))[:-1], counts)
        offsets = np.stack([stops - widths - first, stops - first], axis=1)
        for i in np.flatnonzero(is_whole & (sizes != np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))):
            its = slice(borders[i], borders[i + 1])
            begins = (np.frombuffer(coded[i], dtype=np.uint8) & 0xC0) != 0x80
            so_far = np.cumsum(begins)  # characters that begin up to here; a token may hold a part of one
            offsets[its, 0] = so_far[offsets[its, 0]] - 1
            offsets[its, 1] = so_far[offsets[its, 1] - 1]
        return Read(ids, offsets, counts, is_whole)

    def _ids(self, texts: Sequence[str]) -> tuple[Ids, Numbers]:
        ids, borders = self.loaded.fast.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype="<u4").astype(np.int32), np.frombuffer(borders, dtype="<u8").astype(np.int64)

    def _check(self, texts: Sequence[str], ids: Ids, borders: Numbers) -> None:
        """The two are different programs, and what a token is decides what is learned."""
        some = range(0, len(texts), CHECKED)
        for i, expected in zip(some, _ids_of(self.tokenizer, [texts[i] for i in some]), strict=True):
            found = ids[borders[i] : borders[i + 1]].tolist()
            if found != expected:
                same = (a == b for a, b in zip(found, expected, strict=False))
                at = next((n for n, is_same in enumerate(same) if not is_same), min(len(found), len(expected)))
                raise DataError(
                    f"fastokens and tokenizers read a text differently, from token {at} on: {found[at : at + 8]} and "
                    f"{expected[at : at + 8]}. It begins {texts[i][:80]!r}.\nfastokens is only for speed: go on "
                    "without it (`pip uninstall fastokens`), and please report it."
                )


class LoadedTokenizer:
    """What is read of a tokenizer once, for all the streams of a mixture."""

    def __init__(self, fast: Any, widths: Numbers) -> None:
        """`fast`: its encode_batch_flat(texts) gives ids and borders as bytes (fastokens.Tokenizer's). `widths`: id ->
        bytes of text."""
        self.fast, self.widths = fast, widths


_IN_USE: "WeakValueDictionary[bytes, LoadedTokenizer]" = WeakValueDictionary()


def _widths(tokenizer: "PreTrainedTokenizerBase") -> Numbers:
    vocabulary = tokenizer.get_vocab()
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, i in vocabulary.items():
        widths[i] = len(token)  # a character of a byte-level token is a byte
    for i, added in tokenizer.added_tokens_decoder.items():
        widths[i] = len(added.content.encode())
    return widths


def _ids_of(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=False)[
        "input_ids"
    ]


def _is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    from tokenizers import pre_tokenizers

    backend: Any = tokenizer.backend_tokenizer
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if model.unk_token and not all(model.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet()):
        return False  # a byte that is not in the vocabulary would be a token that says nothing of its width
    splits = list(_parts(backend.pre_tokenizer))
    if not splits or splits[-1]["type"] != "ByteLevel" or splits[-1]["add_prefix_space"]:
        return False
    if any(part["type"] not in ("Split", "Digits") for part in splits[:-1]):
        return False
    if any("\\h" in str(part.get("pattern")) for part in splits):  # a hexadecimal digit, or white space
        return False
    if any(part["type"] != "NFC" for part in _parts(backend.normalizer)):
        return False
    if any(part.get("trim_offsets") for part in _parts(backend.post_processor)):
        return False
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    # `tokenizers` looks for the ones first and for the others in what is left, fastokens for the longest of all
    early, late = ([t.content for t in added if t.normalized is is_late] for is_late in (False, True))
    return not any(_overlap(one, other) for other in late for one in early)


def _overlap(one: str, other: str) -> bool:
    """Whether a text could hold both where one begins before the other has ended."""
    if one in other or other in one:
        return True
    shared = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in shared)


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """What a part of a tokenizer is made of."""
    if component is None:
        return
    state = json.loads(component.__getstate__())
    lists = [state[key] for key in ("normalizers", "pretokenizers", "processors") if key in state]
    yield from chain.from_iterable(lists) if lists else [state]
