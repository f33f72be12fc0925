"""Preview rows as a model sees them: tokens, which of them are trained on, and what became of the other rows."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetuner.data.documents import TOO_LONG
from finetuner.data.packing import Packs
from finetuner.data.prepare import DROPPED_FILE, prepare_documents
from finetuner.data.row_counts import RowCounts
from finetuner.data.row_stream import section_for_documents
from finetuner.data.sources import load_source
from finetuner.data.streaming_source import read_head
from finetuner.data.token_store import IGNORE_INDEX, Ids, TokenStore
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT_CHARACTER = "\ufffd"  # decoded from bytes that are not yet a character
MAX_BYTES_OF_CHARACTER = 4


@dataclass(frozen=True)
class SourcePreview:
    """The first rows of entry `number` of `datasets`, prepared.

    `counts`: rows that were dropped, cut or split, by reason. `row_counts`: those, and turns and ignored names.
    `too_long`: tokens of each row dropped for its length.
    """

    number: int
    path: str
    store: TokenStore
    num_rows: int
    counts: Counter[str]
    row_counts: RowCounts
    too_long: tuple[int, ...]

    @property
    def trained_share(self) -> float:
        """Share of the tokens that are trained on, 0 to 1."""
        return self.store.num_trained / max(1, self.store.num_tokens)


@dataclass(frozen=True)
class TokenRun:
    """Neighboring tokens that are alike in `trained` and `special`, and the text that they stand for."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


def preview_sources(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    *,
    rows: int,
    only: int | None,
    folder: Path,
) -> list[SourcePreview]:
    """Prepare the first `rows` rows of each source (or of source number `only`) as for training, into `folder`.

    No further rows of a stream are read. Raises DataError if there is no such source, or a row cannot be used.
    """
    numbered = list(enumerate(section.datasets))
    if only is not None:
        if not 0 <= only < len(numbered):
            listed = "\n".join(f"  {i}  {entry.path}" for i, entry in numbered)
            raise DataError(f"there is no source {only}. The recipe's datasets are:\n{listed}")
        numbered = [numbered[only]]
    previews = []
    for number, entry in numbered:
        into = folder / str(number)
        into.mkdir()
        first_rows = entry.model_copy(update={"max_samples": min(rows, entry.max_samples or rows)})
        previews.append(_preview_source(section, first_rows, number, tokenizer, seed, into))
    return previews


def _preview_source(
    section: DataSection,
    entry: DatasetEntry,
    number: int,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    into: Path,
) -> SourcePreview:
    alone = section.model_copy(update={"datasets": (entry,), "test_datasets": (), "val_set_size": 0.0})
    prepared = prepare_documents(
        section_for_documents(alone) if section.streaming else alone,
        tokenizer,
        seed,
        into=into,
        open_source=read_head if section.streaming else load_source,
    )
    outcomes = [json.loads(line) for line in (into / DROPPED_FILE).read_text(encoding="utf-8").splitlines()]
    too_long = tuple(outcome["length"] for outcome in outcomes if outcome["reason"] == TOO_LONG)
    (row_counts,) = prepared.row_counts
    return SourcePreview(number, entry.path, prepared.train, prepared.num_rows, prepared.counts, row_counts, too_long)


def pack_previews(previews: list[SourcePreview], sequence_len: int) -> Packs:
    """Pack the documents of all previews together, as for training."""
    documents = [preview.store.document(i) for preview in previews for i in range(len(preview.store))]
    return Packs.of(TokenStore.of(documents), sequence_len)


def preview_lengths(previews: list[SourcePreview]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens of each document, shape (documents,), and of each row dropped as too long, shape (rows,)."""
    lengths = np.concatenate([one.store.lengths for one in previews]) if previews else np.zeros(0, dtype=np.int64)
    return lengths, np.array([length for one in previews for length in one.too_long], dtype=np.int64)


def token_runs(
    ids: Ids, labels: Ids, tokenizer: "PreTrainedTokenizerBase", *, singly: bool = False
) -> Iterator[TokenRun]:
    """Yield a document, `ids` and `labels` of shape (tokens,), as runs of tokens of one kind.

    A special token is a run of its own. `singly`: so is every other token, except that the tokens of one character stay
    together.
    """
    special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [(bool(label != IGNORE_INDEX), int(i) in special_ids) for i, label in zip(ids, labels, strict=True)]
    decoder, start = _TextDecoder(tokenizer), 0
    for kind_at, stop in pairwise(_run_borders(kinds, singly=singly)):
        run = tuple(int(i) for i in ids[start:stop])
        text = decoder.decode(run)
        if singly and REPLACEMENT_CHARACTER in text:  # part of a character, unless the text has that one itself
            goes_on = stop < len(ids) and kinds[stop] == kinds[kind_at]
            if goes_on and stop - start < MAX_BYTES_OF_CHARACTER:
                continue
        yield TokenRun(text, run, *kinds[kind_at])
        start = stop


def _run_borders(kinds: list[tuple[bool, bool]], *, singly: bool) -> list[int]:
    """Return where runs begin, and the end; `kinds`: (trained, special) of each token."""
    inner = range(1, len(kinds))
    changes = [i for i in inner if singly or kinds[i] != kinds[i - 1] or kinds[i][1]]
    return sorted({0, *changes, len(kinds)})


class _TextDecoder:
    """A decoder of tokens in the middle of a text: at its very beginning some tokenizers leave a space out."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer.encode("a", add_special_tokens=False)
        self.anchor_text = self._decode(self.anchor)

    def decode(self, ids: tuple[int, ...]) -> str:
        return self._decode([*self.anchor, *ids]).removeprefix(self.anchor_text)

    def _decode(self, ids: list[int]) -> str:
        decoded: Any = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


def escape_invisible(text: str) -> str:
    """Return the text with a sign for every character that cannot be seen, or that would control the terminal."""
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
