"""Entries -> documents that fit, with every row accounted for, in memory that does not grow with the rows."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuner.data.documents import (
    CUT,
    DROPPED,
    DUPLICATE,
    SPLIT,
    TOO_LONG,
    DocumentMaker,
    Made,
    Outcome,
    Texts,
)
from finetuner.data.fetch import is_address
from finetuner.data.mixture import mixed
from finetuner.data.packing import Packs
from finetuner.data.shuffling import held_out_rows
from finetuner.data.sources import Placed, Source, load_source
from finetuner.data.token_store import Document, Rows, TokenStore
from finetuner.data.token_store_writer import Collector, FileCollector, MemoryCollector
from finetuner.errors import DataError
from finetuner.recipe.rules import looks_local
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Report = Callable[[int, int], None]  # rows done, rows in all

READ_ROWS = 32
BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 20
BATCHES_AHEAD = 2  # one that is tokenised, and one that is ready for it
BY_WEIGHT = "left out by the weights of the datasets"


class SourceShare(NamedTuple):
    """How many documents of a source are trained on, and how many are held out. The stores hold them source by
    source, in this order."""

    name: str
    train: int
    held_out: int


class Part(NamedTuple):
    """Rows [start, stop) of the held-out rows, which are of one source."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Prepared:
    """Training and held-out documents, and what became of the rows that are not among them."""

    train: TokenStore
    held_out: TokenStore
    counts: Counter[str]
    num_rows: int
    shares: tuple[SourceShare, ...]
    train_packs: Packs | None = None
    held_out_packs: Packs | None = None
    listed: Path | None = None  # the file that lists the rows of `counts`

    @property
    def train_rows(self) -> Rows:
        return self.train_packs or self.train

    @property
    def held_out_rows(self) -> Rows:
        return self.held_out_packs or self.held_out

    @property
    def held_out_parts(self) -> tuple[Part, ...]:
        """Source by source, those without a held-out row left out."""
        sizes = [share.held_out for share in self.shares]
        if self.held_out_packs is not None:
            sizes = list(self.held_out_packs.parts)
        ends = np.cumsum(sizes).tolist()
        parts = [Part(s.name, end - size, end) for s, size, end in zip(self.shares, sizes, ends, strict=True)]
        return tuple(part for part in parts if part.stop > part.start)

    @property
    def notes(self) -> list[str]:
        return [f"{count:,} rows {reason}" for reason, count in sorted(self.counts.items())]


def prepare(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    report: Report = lambda done, total: None,
    *,
    into: Path | None = None,
    open_source: Callable[[DatasetEntry, Path], Source] = load_source,
) -> Prepared:
    """Render, tokenise and split all rows; into files of the folder `into`, or into memory.

    Raises DataError if a row cannot be rendered (unless on_bad_row says to skip it), or nothing is left to train on.
    """
    fetched = Path(section.dataset_prepared_path) / "fetched"
    sources = [open_source(entry, fetched) for entry in section.datasets]
    test_sources = [load_source(entry, fetched) for entry in section.test_datasets]
    num_train_rows, num_test_rows = sum(map(len, sources)), sum(map(len, test_sources))
    held_out = held_out_rows(seed, num_train_rows, section.val_set_size)
    num_rows = num_train_rows + num_test_rows

    def collector(name: str) -> Collector:
        return MemoryCollector() if into is None else FileCollector(into, name)

    weighted = any(entry.weight is not None for entry in section.datasets)
    train, held = collector("all" if weighted else "train"), collector("held_out")
    sizes: list[tuple[int, int]] = []
    done = 0
    # Held-out sources first: of equal rows, the first one stays, and a row that is held out is not to be learned.
    is_held_out = iter(np.concatenate([np.ones(num_test_rows, dtype=bool), held_out]))
    with _outcomes(into) as log:
        for source in [*test_sources, *sources]:
            before = (len(train), len(held))
            for batch, made in make_documents(source, section, tokenizer):
                log.add(made.outcomes)
                for placed, documents in zip(batch, made.documents, strict=True):
                    target = held if next(is_held_out) else train
                    if section.dataset_exact_deduplication and documents and not log.is_new(documents):
                        log.add([Outcome(placed.file, placed.number, DUPLICATE, sum(len(ids) for ids, _ in documents))])
                        continue
                    for ids, labels in documents:
                        target.add(ids, labels)
                done += len(batch)
                report(done, num_rows)
            sizes.append((len(train) - before[0], len(held) - before[1]))
    entries = [*section.test_datasets, *section.datasets]
    shares = tuple(SourceShare(name, *size) for name, size in zip(source_names(entries), sizes, strict=True))
    store = train.finish()
    if weighted and len(store):
        full = len(store)
        store, shares = _by_weight(store, shares, section, seed, collector("train"))
        log.counts[BY_WEIGHT] = full - len(store)
    prepared = Prepared(store, held.finish(), log.counts, num_rows, shares)
    _require_documents(prepared, section, held_out)
    return prepared


def make_documents(
    source: Source, section: DataSection, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Sequence[Placed], Made]]:
    """The rows of a source, in order, and what they become.

    While one batch is tokenised, on every core and without Python's lock, the next is read and rendered, and the one
    before is written. Raises DataError at the first row that is wrong.
    """
    maker = DocumentMaker(source.entry, section, tokenizer)
    ahead: deque[tuple[Texts, Future[list[Document]]]] = deque()
    rendered = _rendered(source, maker)

    def first() -> tuple[Sequence[Placed], Made]:
        texts, tokenized = ahead.popleft()
        return texts.rows, maker.fit(texts, tokenized.result())

    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        try:
            for texts in rendered:
                if isinstance(texts, DataError):
                    while ahead:  # what is wrong with an earlier row is to be told before
                        yield first()
                    raise texts
                ahead.append((texts, pool.submit(maker.tokenize, texts)))
                if len(ahead) > BATCHES_AHEAD:
                    yield first()
            while ahead:
                yield first()
        finally:
            for _, tokenized in ahead:
                tokenized.cancel()


def _rendered(source: Source, maker: DocumentMaker) -> Iterator[Texts | DataError]:
    """The rows as texts, so many at a time that few and long ones take no more memory than many short ones; last, what
    is wrong with a row, if something is."""
    some = Texts([], [], [])
    try:
        for rows in source.batches(READ_ROWS):
            some = some.with_more(maker.render(rows))
            if len(some.rows) >= BATCH_ROWS or some.num_characters >= BATCH_CHARACTERS:
                yield some
                some = Texts([], [], [])
    except DataError as error:
        yield some
        yield error
    else:
        if some.rows:
            yield some


class OutcomeLog:
    """Counts rows by what became of them, and lists them in a file."""

    def __init__(self, file: Any = None) -> None:
        self.file, self.counts = file, Counter[str]()
        self.seen: set[bytes] = set()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            self.counts[outcome.reason] += 1
            if self.file is not None:
                self.file.write(json.dumps(outcome._asdict()) + "\n")

    def is_new(self, documents: Sequence[Document]) -> bool:
        """Whether no row before had these tokens and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for ids, labels in documents:
            digest.update(ids.tobytes() + b"|" + labels.tobytes() + b"|")
        before = len(self.seen)
        self.seen.add(digest.digest())
        return len(self.seen) > before


@contextmanager
def _outcomes(into: Path | None) -> Iterator[OutcomeLog]:
    if into is None:
        yield OutcomeLog()
    else:
        with (into / "dropped.jsonl").open("w", encoding="utf-8") as file:
            yield OutcomeLog(file)


def _by_weight(
    store: TokenStore, shares: tuple[SourceShare, ...], section: DataSection, seed: int, into: Collector
) -> tuple[TokenStore, tuple[SourceShare, ...]]:
    """The documents that the weights leave, in their order, and how many of each source they are."""
    num_tests = len(section.test_datasets)
    lengths = np.split(store.lengths, np.cumsum([share.train for share in shares]))[num_tests : len(shares)]
    for entry, one in zip(section.datasets, lengths, strict=True):
        if len(one) == 0:
            raise DataError(f"'{entry.path}' has a weight, and no row of it is left to train on. Remove it.")
    weights = [entry.weight or 1.0 for entry in section.datasets]
    chosen = mixed(lengths, weights, seed, by_tokens=section.mix_by == "tokens")
    for i in np.flatnonzero(np.concatenate(chosen)).tolist():
        into.add(*store.document(i))
    counts = [*(0 for _ in range(num_tests)), *(int(mask.sum()) for mask in chosen)]
    return into.finish(), tuple(s._replace(train=count) for s, count in zip(shares, counts, strict=True))


def source_names(entries: Sequence[DatasetEntry]) -> list[str]:
    """A short name for each entry, no two alike: the file's, or the hub id; with the split or a number where needed."""
    names: list[str] = []
    for entry in entries:
        short = Path(entry.path).name if looks_local(entry.path) or is_address(entry.path) else entry.path
        tries = [short, f"{short} {entry.split}", *(f"{short} #{i}" for i in range(2, len(entries) + 1))]
        names.append(next(name for name in tries if name not in names))
    return names


def held_out_only(section: DataSection) -> DataSection:
    """What is prepared where training rows are streamed."""
    return section.model_copy(update={"datasets": ()})


def packed(prepared: Prepared, sequence_len: int, *, train: bool, held_out: bool) -> Prepared:
    """The same, with packs of the one, the other or both. Packs of held-out rows are of one source each."""
    parts = tuple(share.held_out for share in prepared.shares)
    held = Packs.of(prepared.held_out, sequence_len, parts) if held_out and len(prepared.held_out) else None
    return replace(
        prepared,
        train_packs=Packs.of(prepared.train, sequence_len) if train and len(prepared.train) else None,
        held_out_packs=held,
    )


def require_kept(prepared: Prepared, section: DataSection) -> None:
    """Raises DataError with the table of reasons if more rows are dropped than the recipe allows."""
    counts = {reason: prepared.counts[reason] for reason in DROPPED if prepared.counts[reason]}
    share = sum(counts.values()) / max(1, prepared.num_rows)
    if share <= section.max_dropped_fraction:
        return
    table = "\n".join(f"  {count:>9,} rows {reason}" for reason, count in counts.items())
    listed = f"Each is listed in {prepared.listed}\n" if prepared.listed is not None else ""
    raise DataError(
        f"{share:.1%} of the {prepared.num_rows:,} rows would be dropped, and max_dropped_fraction allows "
        f"{section.max_dropped_fraction:.0%}:\n{table}\n{listed}"
        f"Raise sequence_len (it is {section.sequence_len}), write `excess_length_strategy: truncate` or `split`, or "
        f"allow it: `max_dropped_fraction: {min(1.0, np.ceil(share * 20) / 20):g}`."
    )


def _require_documents(prepared: Prepared, section: DataSection, held_out: NDArray[np.bool_]) -> None:
    dropped = "; ".join(prepared.notes)
    advice = f"Raise sequence_len (it is {section.sequence_len})"
    if not any(prepared.counts[reason] for reason in (TOO_LONG, CUT, SPLIT)):
        advice = "Rows need an answer: a message with role 'assistant', or an output"
    if len(prepared.train) == 0 and section.datasets:
        if held_out.all():
            raise DataError(
                f"val_set_size: {section.val_set_size} holds out all {len(held_out)} rows. Make it smaller."
            )
        raise DataError(f"no row is left to train on, of {len(held_out)}: {dropped}.\n{advice}.")
    if (section.val_set_size or section.test_datasets) and len(prepared.held_out) == 0:
        raise DataError(f"no held-out row is left: {dropped}.\n{advice}, or val_set_size.")
