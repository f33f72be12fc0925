"""A corpus that fits no disk -> rows of a batch, without an end, from any place on.

The stream is made block by block, and a block is a pure function of the state at its start, which is a small value: a
checkpoint keeps it, and the run that goes on makes the same block again. Every rank makes the same rows and learns its
share of them, so that the order does not depend on the number of ranks. A thread makes the next block while the rows
of one are learned.

Documents are drawn so that each source keeps to its weight: always the one that is furthest behind. They are shuffled
within the block. Plain texts (all sources `type: completion`) are joined, with their end-of-text between them, and cut
into rows of exactly sequence_len: a text that does not fit goes on in the next row, so that no token is left out, none
comes twice and no row is padded. Other rows stay whole, in packs with sample_packing and alone without.
"""

import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetuner.data.batches import as_one
from finetuner.data.documents import DocumentMaker, Outcome
from finetuner.data.dropped_rows import READ, Listing, dropped_share, notes_of
from finetuner.data.packing import best_fit_decreasing
from finetuner.data.remote_files import PATIENT, Patience
from finetuner.data.shuffling import mix, row_order
from finetuner.data.streaming_source import START, EndlessRows, FileFacts, Place
from finetuner.data.token_store import Document
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = list[Document]
_READ_ROWS = 16
_NO_LIMIT = 1 << 40
# Tokens of a block, whose documents are mixed and packed: the first step waits for the first block, so it is small.
_FIRST_TOKENS, _MOST_TOKENS = 1 << 16, 1 << 20
_ROWS_TO_JUDGE = 10_000  # so many are read before their losses stop a run in the middle of a block
_STEPS_BACK = 4  # a checkpoint is of the step that is done, and the next ones are made by then


@dataclass(frozen=True)
class StreamState:
    """Where a block begins. `taken`: rows or tokens of each source so far; `carry`: tokens and labels that filled no
    row of the block before, document by document; `counts`: rows read, and those not learned as they stand by reason,
    since the stream began."""

    first_row: int = 0
    block: int = 0
    places: list[Place] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    carry: list[list[list[int]]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """Some rows of a stream, numbered from 0."""

    rows: list[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def documents(self, i: int) -> Row:
        return self.rows[i]

    def length(self, i: int) -> int:
        return sum(len(ids) for ids, _ in self.rows[i])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([self.length(i) for i in range(len(self.rows))], dtype=np.int64)

    @property
    def sha256(self) -> str:
        parts = [part.tobytes() for row in self.rows for document in row for part in document]
        return hashlib.sha256(b"|".join(parts)).hexdigest()


class _Drawn:
    """Rows of one source, made into documents some at a time, each with the place behind it."""

    def __init__(self, rows: EndlessRows, maker: DocumentMaker) -> None:
        self.rows, self.maker = rows, maker
        self.place = list(rows.place)
        self.ready: deque[tuple[list[Document], list[Outcome], Place]] = deque()
        self.found_nothing_since = self.place[0]

    def draw(self, tally: Callable[[list[Outcome], int], Counter[str]]) -> list[Document]:
        """The documents of the next row that gives any. `tally` is told of each row what became of it and in which
        pass, and gives the counts of all."""
        while True:
            while self.ready:
                documents, outcomes, self.place = self.ready.popleft()
                counts = tally(outcomes, self.place[0])
                if documents:
                    self.found_nothing_since = self.place[0]
                    return documents
                if self.place[0] > self.found_nothing_since + 1:
                    lost = "; ".join(notes_of(counts))
                    raise DataError(f"no row of '{self.maker.entry.path}' is left to train on: {lost}.")
            taken = self.rows.take(_READ_ROWS)
            made = self.maker.make([placed for placed, _ in taken])
            of_row: dict[tuple[str, int], list[Outcome]] = {}
            for outcome in made.outcomes:
                of_row.setdefault((outcome.source, outcome.row), []).append(outcome)
            for (placed, place), documents in zip(taken, made.documents, strict=True):
                self.ready.append((documents, of_row.get((placed.file, placed.number), []), place))


class RowStream:
    """Rows by their number, in order; a little way back as well, which is what a checkpoint asks for."""

    def __init__(
        self,
        section: DataSection,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        *,
        packing: bool,
        state: StreamState | None = None,
        listed: Path | None = None,
        patience: Patience = PATIENT,
        ahead: bool = False,
    ) -> None:
        """`packing`: whole documents share a row; where documents are joined, they do not see each other. `listed`:
        the file that lists the rows that are not learned. `patience`: with a connection that breaks. `ahead`: make the
        next block beside, until `close` is called.

        Raises DataError if a source cannot be read.
        """
        self.section, self.seed, self.packing = section, seed, packing
        self.joined = is_joined(section)
        count = len(section.datasets)
        start = state or StreamState(places=[list(START) for _ in range(count)], taken=[0] * count)
        of_maker = documents_of(section)
        fetched = Path(section.dataset_prepared_path) / "fetched"
        self.sources = [
            _Drawn(EndlessRows(entry, place, fetched, patience), DocumentMaker(entry, of_maker, tokenizer))
            for entry, place in zip(section.datasets, start.places, strict=True)
        ]
        self.next = start
        self.listing = Listing(listed, start.block)
        self.blocks: deque[tuple[StreamState, list[Row]]] = deque()
        self.maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks") if ahead else None
        self.coming: Future[tuple[list[Row], StreamState]] | None = None
        self.is_closed = threading.Event()
        self.lock = threading.Lock()  # a thread makes rows ahead while another asks for the position

    def rows(self, first: int, count: int) -> StreamedRows:
        """Rows first .. first + count - 1. Raises DataError at a row that cannot be used."""
        with self.lock:
            return self._rows(first, count)

    def _rows(self, first: int, count: int) -> StreamedRows:
        while self.next.first_row < first + count:
            state = self.next
            rows, self.next = self._block(state) if self.coming is None else self.coming.result()
            self.blocks.append((state, rows))
            if self.maker is not None:
                self.coming = self.maker.submit(self._block, self.next)
        while len(self.blocks) > 1 and self.blocks[1][0].first_row <= first - _STEPS_BACK * count:
            self.blocks.popleft()
        some: list[Row] = []
        for state, rows in self.blocks:
            some += rows[max(0, first - state.first_row) : max(0, first + count - state.first_row)]
        assert len(some) == count, "rows are asked for in order"
        return StreamedRows(some)

    def close(self) -> None:
        """End the thread that makes blocks; whoever waits for one gets CancelledError."""
        self.is_closed.set()
        if self.maker is not None:
            self.maker.shutdown(wait=True, cancel_futures=True)

    def state_at(self, row: int) -> StreamState:
        """The state from which a new stream comes to this row."""
        with self.lock:
            if row >= self.next.first_row:
                return self.next
            return next(state for state, rows in self.blocks if row < state.first_row + len(rows))

    @property
    def files(self) -> list[list[FileFacts]]:
        """The files of each source, and what tells them from other versions of themselves."""
        return [source.rows.files.facts for source in self.sources]

    @property
    def notes(self) -> list[str]:
        """Rows that were read since the stream began and are not learned as they stand."""
        return notes_of(self.next.counts)

    @property
    def num_read(self) -> int:
        """Rows that were read since the stream began; those that come again in a later pass count again."""
        return self.next.counts.get(READ, 0)

    def _block(self, state: StreamState) -> tuple[list[Row], StreamState]:
        taken, counts = list(state.taken), Counter(state.counts)

        def tally(outcomes: list[Outcome], passed: int) -> Counter[str]:
            if self.is_closed.is_set():
                raise CancelledError
            counts.update([READ, *(outcome.reason for outcome in outcomes)])
            if passed == 0:  # later passes lose the same rows again
                self.listing.add(outcomes, state.block)
            if counts[READ] % _ROWS_TO_JUDGE == 0:
                self._require_kept(counts)
            return counts

        weights = [entry.weight or 1.0 for entry in self.section.datasets]
        documents: list[Document] = []
        most = max(8 * self.section.sequence_len, min(_MOST_TOKENS, _FIRST_TOKENS << min(state.block, 8)))
        tokens = 0
        while tokens < most and len(documents) < self.section.streaming_multipack_buffer_size:
            behind = min(range(len(taken)), key=lambda s: taken[s] / weights[s])
            drawn = self.sources[behind].draw(tally)
            documents += drawn
            count = sum(len(ids) for ids, _ in drawn)
            tokens += count
            taken[behind] += count if self.section.mix_by == "tokens" else 1
        self._require_kept(counts)
        order = row_order(mix(self.seed, 0x57E4, state.block), 0, len(documents))
        documents = [documents[i] for i in order]
        carry: list[Document] = []
        if self.joined:
            before = [(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)) for ids, labels in state.carry]
            rows, carry = cut_into_rows([*before, *documents], self.section.sequence_len)
            rows = rows if self.packing else [[as_one(row)] for row in rows]
        elif self.packing:
            rows = self._packs(documents, state.block)
        else:
            rows = [[document] for document in documents]
        return rows, StreamState(
            first_row=state.first_row + len(rows),
            block=state.block + 1,
            places=[source.place for source in self.sources],
            taken=taken,
            carry=[[ids.tolist(), labels.tolist()] for ids, labels in carry],
            counts=dict(counts),
        )

    def _packs(self, documents: list[Document], block: int) -> list[Row]:
        lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
        members, starts = best_fit_decreasing(lengths, self.section.sequence_len)
        order = row_order(mix(self.seed, 0xB14C, block), 0, len(starts) - 1)
        return [[documents[m] for m in members[starts[i] : starts[i + 1]]] for i in order]

    def _require_kept(self, counts: Counter[str]) -> None:
        share = dropped_share(counts)
        if share > self.section.max_dropped_fraction:
            listed = f"\nThey are listed in {self.listing.path}" if self.listing.path is not None else ""
            raise DataError(
                f"{share:.1%} of the {counts[READ]:,} rows read so far are dropped, and max_dropped_fraction "
                f"allows {self.section.max_dropped_fraction:.0%}: {'; '.join(notes_of(counts))}.{listed}"
            )


def is_joined(section: DataSection) -> bool:
    """Whether a stream of these sources is cut into full rows."""
    return all(entry.type == "completion" for entry in section.datasets)


def documents_of(section: DataSection) -> DataSection:
    """How a stream's documents are made: a text that is cut into rows has no length that would be too long."""
    return section.model_copy(update={"sequence_len": _NO_LIMIT}) if is_joined(section) else section


def cut_into_rows(documents: list[Document], length: int) -> tuple[list[Row], list[Document]]:
    """(rows of exactly `length` tokens, what fills none): the documents end to end; one that crosses a border goes on
    in the next row."""
    rows: list[Row] = []
    row: Row = []
    room = length
    for ids, labels in documents:
        at = 0
        while at < len(ids):
            part = slice(at, at + room)
            row.append((ids[part], labels[part]))
            at += len(ids[part])
            room -= len(ids[part])
            if room == 0:
                rows.append(row)
                row, room = [], length
    return rows, row
