"""What a model will see of some rows: their tokens with what is learned of each, and what became of the rest."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.data.documents import TOO_LONG
from finetuner.data.packing import Packs
from finetuner.data.prepare import prepare
from finetuner.data.sources import load_source
from finetuner.data.stream import documents_of
from finetuner.data.stream_source import head_of
from finetuner.data.tokens import IGNORE, Ids, TokenStore
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what bytes become that are not yet a character
BYTES_OF_A_CHARACTER = 4


@dataclass(frozen=True)
class SourceView:
    """The first rows of one entry of `datasets`. `too_long`: tokens of each row that was dropped for its length."""

    number: int
    path: str
    store: TokenStore
    num_rows: int
    counts: Counter[str]
    too_long: tuple[int, ...]

    @property
    def trained_share(self) -> float:
        return self.store.num_trained / max(1, self.store.num_tokens)


@dataclass(frozen=True)
class Shown:
    """Neighbouring tokens of one kind, and the text they stand for."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


def look(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    *,
    rows: int,
    only: int | None,
    folder: Path,
) -> list[SourceView]:
    """The first `rows` rows of each source, or of source `only`, prepared as for training, into `folder`. Of a stream
    no more than those is read.

    Raises DataError if there is no such source, or a row cannot be used.
    """
    numbered = list(enumerate(section.datasets))
    if only is not None:
        if not 0 <= only < len(numbered):
            listed = "\n".join(f"  {i}  {entry.path}" for i, entry in numbered)
            raise DataError(f"there is no source {only}. The recipe's datasets are:\n{listed}")
        numbered = [numbered[only]]
    views = []
    for number, entry in numbered:
        few = entry.model_copy(update={"max_samples": min(rows, entry.max_samples or rows)})
        one = section.model_copy(update={"datasets": (few,), "test_datasets": (), "val_set_size": 0.0})
        into = folder / str(number)
        into.mkdir()
        prepared = prepare(
            documents_of(one) if section.streaming else one,
            tokenizer,
            seed,
            into=into,
            open_source=head_of if section.streaming else load_source,
        )
        outcomes = [json.loads(line) for line in (into / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
        too_long = tuple(outcome["length"] for outcome in outcomes if outcome["reason"] == TOO_LONG)
        views.append(SourceView(number, entry.path, prepared.train, prepared.num_rows, prepared.counts, too_long))
    return views


def packs_of(views: list[SourceView], sequence_len: int) -> Packs:
    documents = [view.store.document(i) for view in views for i in range(len(view.store))]
    return Packs.of(TokenStore.of(documents), sequence_len)


def shown(ids: Ids, labels: Ids, tokenizer: "PreTrainedTokenizerBase", *, singly: bool = False) -> Iterator[Shown]:
    """The document in pieces that are trained on or not, and a special token or none; `singly`: as small as can be."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [(bool(label != IGNORE), int(i) in special) for i, label in zip(ids, labels, strict=True)]
    borders = [
        i for i in range(len(ids) + 1) if i in (0, len(ids)) or singly or kinds[i] != kinds[i - 1] or kinds[i][1]
    ]
    reader, begun = _Reader(tokenizer), 0
    for a, b in pairwise(borders):
        part = tuple(int(i) for i in ids[begun:b])
        text = reader.text(part)
        # a character of several tokens is shown once it is whole
        if singly and BROKEN in text and b < len(ids) and kinds[b] == kinds[a] and b - begun < BYTES_OF_A_CHARACTER:
            continue
        yield Shown(text, part, *kinds[a])
        begun = b


class _Reader:
    """Text of tokens as it stands behind other text: at the very beginning some tokenizers leave a space out."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer.encode("a", add_special_tokens=False)
        self.before = self._decode(self.anchor)

    def text(self, ids: tuple[int, ...]) -> str:
        return self._decode([*self.anchor, *ids]).removeprefix(self.before)

    def _decode(self, ids: list[int]) -> str:
        decoded: Any = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


def visible(text: str) -> str:
    """The text with a sign for every character that cannot be seen, or that would steer the terminal."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F or (unicodedata.category(character) in ("Cc", "Cf") and character not in "\u200d\ufe0f"):
        return f"\\u{code:04x}"
    return character


def lengths_of(views: list[SourceView]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each document that is learned, and of each row that is too long to be."""
    kept = np.concatenate([view.store.lengths for view in views]) if views else np.zeros(0, dtype=np.int64)
    return kept, np.array([length for view in views for length in view.too_long], dtype=np.int64)
