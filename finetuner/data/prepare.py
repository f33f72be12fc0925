"""Prepare documents: read, render, tokenize and split all rows, in memory that does not grow with their number."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetuner.data.documents import (
    BY_WEIGHT,
    CUT,
    DUPLICATE,
    NOTED,
    SPLIT,
    TOO_LONG,
    DocumentMaker,
    MadeDocuments,
    Outcome,
    Texts,
)
from finetuner.data.fetch import is_address
from finetuner.data.mixture import select_mixture
from finetuner.data.prepared_data import PreparedData, SourceShare
from finetuner.data.row_counts import RowCounts
from finetuner.data.shuffling import held_out_rows
from finetuner.data.sources import Source, SourceRow, load_source
from finetuner.data.token_store import Document, TokenStore
from finetuner.data.token_store_writer import FileWriter, MemoryWriter, TokenCounts, TokenStoreWriter
from finetuner.errors import DataError
from finetuner.recipe.rules import looks_local
from finetuner.recipe.sections import DataSection, DatasetEntry
from finetuner.recipe.sections.datasets import CHATS
from finetuner.storage.progress import ProgressReport, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_ROWS = 32  # rendered together
BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 20  # tokenized together: whichever is reached first
BATCHES_AHEAD = 2  # one that is being tokenized, and one that waits for it
DROPPED_FILE = "dropped.jsonl"


def prepare_documents(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    report: ProgressReport = no_progress,
    *,
    into: Path | None = None,
    open_source: Callable[[DatasetEntry, Path], Source] = load_source,
) -> PreparedData:
    """Render, tokenize and split all rows, into files of the folder `into`, or into memory.

    `report` is told of rows. Raises DataError if a row cannot be rendered (unless on_bad_row says to skip it), or no
    document is left to train on.
    """
    fetched = Path(section.dataset_prepared_path) / "fetched"
    sources = [open_source(entry, fetched) for entry in section.datasets]
    test_sources = [load_source(entry, fetched) for entry in section.test_datasets]
    num_train_rows, num_test_rows = sum(map(len, sources)), sum(map(len, test_sources))
    held_out = held_out_rows(seed, num_train_rows, section.val_set_size)
    num_rows = num_train_rows + num_test_rows

    num_done = 0

    def report_more(rows: int) -> None:
        nonlocal num_done
        num_done += rows
        report(num_done, num_rows)

    def writer(name: str) -> TokenStoreWriter:
        return MemoryWriter() if into is None else FileWriter(into, name)

    is_weighted = any(entry.weight is not None for entry in section.datasets)
    with _outcome_log(into) as log:
        split = _Split(writer("all" if is_weighted else "train"), writer("held_out"))
        # Test datasets first: of equal rows the first one stays, so that a row that is held out is not trained on.
        is_held_out = iter(np.concatenate([np.ones(num_test_rows, dtype=bool), held_out]))
        sizes: list[tuple[int, int]] = []
        row_counts: list[RowCounts] = []
        for source in [*test_sources, *sources]:
            before = split.sizes
            row_counts.append(_add_source(source, section, tokenizer, split, log, is_held_out, report_more))
            sizes.append((split.sizes[0] - before[0], split.sizes[1] - before[1]))
    entries = [*section.test_datasets, *section.datasets]
    shares = tuple(SourceShare(name, *size) for name, size in zip(source_names(entries), sizes, strict=True))
    store = split.train.finish()
    if is_weighted and len(store):
        num_documents = len(store)
        store, shares = _apply_weights(store, shares, section, seed, writer("train"))
        log.counts[BY_WEIGHT] = num_documents - len(store)
    prepared = PreparedData(store, split.held_out.finish(), log.counts, num_rows, shares, tuple(row_counts))
    _require_documents(prepared, section, held_out)
    return prepared


def _add_source(
    source: Source,
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    split: "_Split",
    log: "OutcomeLog",
    is_held_out: Iterator[bool],
    report_more: Callable[[int], None],
) -> RowCounts:
    """Write the documents of a source's rows, and return what became of the rows."""
    counts, before = RowCounts(), split.token_counts
    for rows, made in make_documents(source, section, tokenizer):
        log.add(made.outcomes)
        counts.add(made)
        for row, documents, text in zip(rows, made.documents, made.texts, strict=True):
            hold_out = bool(next(is_held_out))
            if section.dataset_exact_deduplication and documents and not log.is_new(documents):
                log.add([Outcome(row.file, row.number, DUPLICATE, sum(len(ids) for ids, _ in documents))])
                counts.take_duplicate_out(text)
            else:
                split.add(documents, hold_out=hold_out)
        report_more(len(rows))
    after = split.token_counts
    counts.add_tokens(TokenCounts(after.tokens - before.tokens, after.trained - before.trained))
    return counts


def make_documents(
    source: Source, section: DataSection, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Sequence[SourceRow], MadeDocuments]]:
    """Yield the rows of a source, batch by batch in order, with the documents that they become.

    While one batch is tokenized, on every core and without Python's lock, the next is read and rendered, and the one
    before is written. Raises DataError at the first row that is wrong.
    """
    maker = DocumentMaker(source.entry, section, tokenizer)
    ahead: deque[tuple[Texts, Future[list[Document]]]] = deque()

    def oldest() -> tuple[Sequence[SourceRow], MadeDocuments]:
        texts, tokenized = ahead.popleft()
        return texts.rows, maker.fit_to_length(texts, tokenized.result())

    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        try:
            for texts in _render_batches(source, maker):
                if isinstance(texts, DataError):
                    while ahead:  # an error of an earlier row is to be raised before this one
                        yield oldest()
                    raise texts
                ahead.append((texts, pool.submit(maker.tokenize, texts)))
                if len(ahead) > BATCHES_AHEAD:
                    yield oldest()
            while ahead:
                yield oldest()
        finally:
            for _, tokenized in ahead:
                tokenized.cancel()


def _render_batches(source: Source, maker: DocumentMaker) -> Iterator[Texts | DataError]:
    """Yield the rows as texts, in batches of limited characters; the last one may be the error of a row.

    Few long rows take no more memory than many short ones. The error is yielded, not raised, so that the rows before it
    can be tokenized first.
    """
    batch, num_characters = Texts([], [], []), 0
    try:
        for rows in source.batches(READ_ROWS):
            more = maker.render(rows)
            batch.add(more)
            num_characters += more.num_characters
            if len(batch.rows) >= BATCH_ROWS or num_characters >= BATCH_CHARACTERS:
                yield batch
                batch, num_characters = Texts([], [], []), 0
    except DataError as error:
        yield batch
        yield error
    else:
        if batch.rows:
            yield batch


class OutcomeLog:
    """The rows that were dropped, cut or split: counts by reason, a file that lists them, and digests of rows seen."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self.file, self.counts = file, Counter[str]()
        self.digests: set[bytes] = set()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count outcomes, and write one line of JSON for each but those that are only noted."""
        for outcome in outcomes:
            self.counts[outcome.reason] += 1
            if self.file is not None and outcome.reason not in NOTED:
                self.file.write(json.dumps(outcome._asdict()) + "\n")

    def is_new(self, documents: Sequence[Document]) -> bool:
        """Return whether no earlier row had these tokens and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for ids, labels in documents:
            digest.update(ids.tobytes() + b"|" + labels.tobytes() + b"|")
        num_before = len(self.digests)
        self.digests.add(digest.digest())
        return len(self.digests) > num_before


@contextmanager
def _outcome_log(into: Path | None) -> Iterator[OutcomeLog]:
    if into is None:
        yield OutcomeLog()
    else:
        with (into / DROPPED_FILE).open("w", encoding="utf-8") as file:
            yield OutcomeLog(file)


@dataclass(frozen=True)
class _Split:
    """Writers of the documents that are trained on and of those that are held out."""

    train: TokenStoreWriter
    held_out: TokenStoreWriter

    @property
    def sizes(self) -> tuple[int, int]:
        """Documents so far: trained on, held out."""
        return len(self.train), len(self.held_out)

    @property
    def token_counts(self) -> TokenCounts:
        """Tokens of all documents so far."""
        train, held_out = self.train.token_counts(), self.held_out.token_counts()
        return TokenCounts(train.tokens + held_out.tokens, train.trained + held_out.trained)

    def add(self, documents: list[Document], *, hold_out: bool) -> None:
        """Write the documents of a row."""
        writer = self.held_out if hold_out else self.train
        for ids, labels in documents:
            writer.add(ids, labels)


def _apply_weights(
    store: TokenStore, shares: tuple[SourceShare, ...], section: DataSection, seed: int, writer: TokenStoreWriter
) -> tuple[TokenStore, tuple[SourceShare, ...]]:
    """Return the documents that the weights of the datasets choose, in their order, and the shares of the sources."""
    num_tests = len(section.test_datasets)
    lengths = np.split(store.lengths, np.cumsum([share.train for share in shares]))[num_tests : len(shares)]
    for entry, source_lengths in zip(section.datasets, lengths, strict=True):
        if len(source_lengths) == 0:
            raise DataError(f"'{entry.path}' has a weight, and no row of it is left to train on. Remove it.")
    weights = [entry.weight or 1.0 for entry in section.datasets]
    masks = select_mixture(lengths, weights, seed, by_tokens=section.mix_by == "tokens")
    for i in np.flatnonzero(np.concatenate(masks)).tolist():
        writer.add(*store.document(i))
    counts = [*(0 for _ in range(num_tests)), *(int(mask.sum()) for mask in masks)]
    return writer.finish(), tuple(s._replace(train=count) for s, count in zip(shares, counts, strict=True))


def source_names(entries: Sequence[DatasetEntry]) -> list[str]:
    """Return a short unique name for each entry: the file's name or the hub id, with split or number where needed."""
    names: list[str] = []
    for entry in entries:
        short = Path(entry.path).name if looks_local(entry.path) or is_address(entry.path) else entry.path
        candidates = [short, f"{short} {entry.split}", *(f"{short} #{i}" for i in range(2, len(entries) + 1))]
        names.append(next(name for name in candidates if name not in names))
    return names


def _answer_advice(section: DataSection) -> str:
    trained = sorted({role for entry in section.datasets if entry.type in CHATS for role in entry.roles_to_train})
    if trained in ([], ["assistant"]):
        return (
            "Rows need an answer: a message with role 'assistant', or an output, of which nothing says `train: false`"
        )
    return f"Rows need a message of a role in roles_to_train: {', '.join(trained)}"


def _require_documents(prepared: PreparedData, section: DataSection, held_out: NDArray[np.bool_]) -> None:
    """Raise DataError if no document is left to train on, or none is held out although the recipe asks for some."""
    dropped = "; ".join(prepared.notes)
    advice = f"Raise sequence_len (it is {section.sequence_len})"
    if not any(prepared.counts[reason] for reason in (TOO_LONG, CUT, SPLIT)):
        advice = _answer_advice(section)
    if len(prepared.train) == 0 and section.datasets:
        if held_out.all():
            raise DataError(
                f"val_set_size: {section.val_set_size} holds out all {len(held_out)} rows. Make it smaller."
            )
        raise DataError(f"no row is left to train on, of {len(held_out)}: {dropped}.\n{advice}.")
    if (section.val_set_size or section.test_datasets) and len(prepared.held_out) == 0:
        raise DataError(f"no held-out row is left: {dropped}.\n{advice}, or val_set_size.")
