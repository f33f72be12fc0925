"""Stream the rows of a corpus that fits no disk, without end and from any row on.

The stream is built block by block, and a block is a pure function of the state at its start, which is a small value: a
checkpoint saves it, and a resumed run builds the same block again. Every rank builds the same rows and trains on its
share of them, so the order does not depend on the number of ranks. A thread builds the next block while the rows of one
are trained on.

Documents are drawn so that each source follows its weight: always from the source that is furthest behind. They are
shuffled within the block. Plain texts (all sources `type: completion`) are joined, with their end-of-text between them,
and cut into rows of exactly sequence_len: a text that crosses a border goes on in the next row, so no token is lost,
none comes twice and no row is padded. Other documents stay uncut: in packs with sample_packing, and one a row without.
"""

import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetuner.data.documents import DocumentMaker, Outcome
from finetuner.data.dropped_rows import READ, DroppedRowsFile, drop_notes, dropped_share
from finetuner.data.packing import best_fit_decreasing
from finetuner.data.remote_files import DEFAULT_RETRY, RetryPolicy
from finetuner.data.row_counts import RowCounts
from finetuner.data.shuffling import derive_seed, row_order
from finetuner.data.streaming_source import START, FileVersion, Position, StreamingSource
from finetuner.data.token_store import Document, join_documents
from finetuner.data.token_store_writer import count_tokens
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StreamRow = list[Document]  # a row of a batch: one document or several
_ROWS_AT_ONCE = 16  # dataset rows that are read and tokenized together
_NO_LIMIT = 1 << 40
# Tokens of a block, within which documents are shuffled and packed. The first blocks are smaller, since training waits
# for the first one.
_FIRST_BLOCK_TOKENS, _MAX_BLOCK_TOKENS = 1 << 16, 1 << 20
_ROWS_TO_JUDGE = 10_000  # max_dropped_fraction is checked after each block, and within it after so many rows
_STEPS_BACK = 4  # a checkpoint asks for the state of a finished step when later steps are loaded already


@dataclass(frozen=True)
class StreamState:
    """All that a block depends on, saved in checkpoints under these names.

    `first_row`: number of the block's first row. `places`: position of the next row in each source. `taken`: documents
    (or tokens, with mix_by: tokens) drawn from each source so far. `carry`: [ids, labels] of the documents that filled
    no row of the block before. `counts`: rows read since the stream began, and those dropped, cut or split by reason.
    """

    first_row: int = 0
    block: int = 0
    places: list[Position] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    carry: list[list[list[int]]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """Consecutive rows of a stream, numbered from 0 (see TokenRows)."""

    rows: list[StreamRow]

    def __len__(self) -> int:
        return len(self.rows)

    def documents(self, i: int) -> StreamRow:
        """Documents of row i, in order."""
        return self.rows[i]

    def length(self, i: int) -> int:
        """Tokens of row i."""
        return sum(len(ids) for ids, _ in self.rows[i])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row, shape (rows,)."""
        return np.array([self.length(i) for i in range(len(self.rows))], dtype=np.int64)

    @property
    def sha256(self) -> str:
        """Digest of all ids and labels."""
        arrays = [array.tobytes() for row in self.rows for document in row for array in document]
        return hashlib.sha256(b"|".join(arrays)).hexdigest()


Tally = Callable[[list[Outcome], int], Counter[str]]  # (outcomes of a row, its pass) -> counts of all rows so far


class _DocumentSource:
    """The documents of one source, made from a few rows at a time."""

    def __init__(self, rows: StreamingSource, maker: DocumentMaker) -> None:
        self.rows, self.maker, self.counts = rows, maker, RowCounts()
        self.position = list(rows.position)  # after the last row that was drawn
        self.ready: deque[tuple[list[Document], list[Outcome], Position]] = deque()
        self.last_productive_pass = self.position[0]

    def draw(self, tally: Tally) -> list[Document]:
        """Return the documents of the next row that gives any; `tally` is called for every row up to it.

        Raises DataError if a full pass over the source gives no document.
        """
        while True:
            while self.ready:
                documents, outcomes, self.position = self.ready.popleft()
                counts = tally(outcomes, self.position[0])
                if documents:
                    self.last_productive_pass = self.position[0]
                    return documents
                if self.position[0] > self.last_productive_pass + 1:
                    notes = "; ".join(drop_notes(counts))
                    raise DataError(f"no row of '{self.maker.entry.path}' is left to train on: {notes}.")
            self._read_ahead()

    def _read_ahead(self) -> None:
        taken = self.rows.take(_ROWS_AT_ONCE)
        made = self.maker.make([row for row, _ in taken])
        self.counts.add(made)
        self.counts.add_tokens(count_tokens(one for documents in made.documents for one in documents))
        outcomes_of_row: dict[tuple[str, int], list[Outcome]] = {}
        for outcome in made.outcomes:
            outcomes_of_row.setdefault((outcome.source, outcome.row), []).append(outcome)
        for (row, position), documents in zip(taken, made.documents, strict=True):
            self.ready.append((documents, outcomes_of_row.get((row.file, row.number), []), position))


class RowStream:
    """An endless stream of rows, read by number in ascending order; states of a few steps back are remembered."""

    def __init__(
        self,
        section: DataSection,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        *,
        packing: bool,
        state: StreamState | None = None,
        dropped_file: Path | None = None,
        retry: RetryPolicy = DEFAULT_RETRY,
        ahead: bool = False,
    ) -> None:
        """`packing`: several documents share a row and do not see each other. `state`: start there (default: at the
        first row). `dropped_file`: list there the rows that are dropped, cut or split. `retry`: for connections that
        break. `ahead`: build the next block in a thread, until `close` is called.

        Raises DataError if a source cannot be read.
        """
        self.section, self.seed, self.packing = section, seed, packing
        self.joined = joins_documents(section)
        count = len(section.datasets)
        start = state or StreamState(places=[list(START) for _ in range(count)], taken=[0] * count)
        document_section = section_for_documents(section)
        fetched = Path(section.dataset_prepared_path) / "fetched"
        self.sources = [
            _DocumentSource(
                StreamingSource(entry, position, fetched, retry), DocumentMaker(entry, document_section, tokenizer)
            )
            for entry, position in zip(section.datasets, start.places, strict=True)
        ]
        self.next = start
        self.first_counts: list[RowCounts] = []  # of the rows read for the first block since this start
        self.listing = DroppedRowsFile(dropped_file, start.block)
        self.blocks: deque[tuple[StreamState, list[StreamRow]]] = deque()
        self.builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks") if ahead else None
        self.coming: Future[tuple[list[StreamRow], StreamState]] | None = None
        self.is_closed = threading.Event()
        self.lock = threading.Lock()  # one thread may load rows while another asks for the state

    def rows(self, first: int, count: int) -> StreamedRows:
        """Return rows first .. first + count - 1. Raises DataError at a row that cannot be used."""
        with self.lock:
            while self.next.first_row < first + count:
                self._append_block()
            while len(self.blocks) > 1 and self.blocks[1][0].first_row <= first - _STEPS_BACK * count:
                self.blocks.popleft()
            found: list[StreamRow] = []
            for state, rows in self.blocks:
                found += rows[max(0, first - state.first_row) : max(0, first + count - state.first_row)]
            assert len(found) == count, "rows are asked for in order"
            return StreamedRows(found)

    def _append_block(self) -> None:
        state = self.next
        rows, self.next = self._build_block(state) if self.coming is None else self.coming.result()
        self.blocks.append((state, rows))
        if not self.first_counts:
            self.first_counts = deepcopy([source.counts for source in self.sources])
        if self.builder is not None:
            self.coming = self.builder.submit(self._build_block, self.next)

    def close(self) -> None:
        """Stop the thread that builds blocks; a thread that waits for a block gets CancelledError."""
        self.is_closed.set()
        if self.builder is not None:
            self.builder.shutdown(wait=True, cancel_futures=True)

    def state_at(self, row: int) -> StreamState:
        """Return the state of the block that holds this row, from which a new stream builds it again."""
        with self.lock:
            if row >= self.next.first_row:
                return self.next
            return next(state for state, rows in self.blocks if row < state.first_row + len(rows))

    @property
    def files(self) -> list[list[FileVersion]]:
        """The versions of the files of each source."""
        return [source.rows.files.versions for source in self.sources]

    @property
    def notes(self) -> list[str]:
        """A note per reason on the rows dropped, cut or split since the stream began."""
        return drop_notes(self.next.counts)

    @property
    def num_read(self) -> int:
        """Dataset rows read since the stream began; those that come again in a later pass count again."""
        return self.next.counts.get(READ, 0)

    def _build_block(self, state: StreamState) -> tuple[list[StreamRow], StreamState]:
        """Return the rows of the block that begins at `state`, and the state of the next one."""
        counts, taken = Counter(state.counts), list(state.taken)
        documents = self._draw_documents(state.block, taken, counts)
        self._require_few_dropped(counts)
        order = row_order(derive_seed(self.seed, 0x57E4, state.block), 0, len(documents))
        documents = [documents[i] for i in order]
        carry: list[Document] = []
        if self.joined:
            before = [(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)) for ids, labels in state.carry]
            rows, carry = cut_into_rows([*before, *documents], self.section.sequence_len)
            rows = rows if self.packing else [[join_documents(row)] for row in rows]
        elif self.packing:
            rows = self._pack(documents, state.block)
        else:
            rows = [[document] for document in documents]
        return rows, StreamState(
            first_row=state.first_row + len(rows),
            block=state.block + 1,
            places=[source.position for source in self.sources],
            taken=taken,
            carry=[[ids.tolist(), labels.tolist()] for ids, labels in carry],
            counts=dict(counts),
        )

    def _draw_documents(self, block: int, taken: list[int], counts: Counter[str]) -> list[Document]:
        """Return the documents of a block, source by source as the weights say; adds to `taken` and `counts`."""

        def tally(outcomes: list[Outcome], num_passes: int) -> Counter[str]:
            if self.is_closed.is_set():
                raise CancelledError
            counts.update([READ, *(outcome.reason for outcome in outcomes)])
            if num_passes == 0:  # later passes lose the same rows again
                self.listing.add(outcomes, block)
            if counts[READ] % _ROWS_TO_JUDGE == 0:
                self._require_few_dropped(counts)
            return counts

        weights = [entry.weight or 1.0 for entry in self.section.datasets]
        documents: list[Document] = []
        growing = min(_MAX_BLOCK_TOKENS, _FIRST_BLOCK_TOKENS << min(block, 8))
        max_tokens, num_tokens = max(8 * self.section.sequence_len, growing), 0
        while num_tokens < max_tokens and len(documents) < self.section.streaming_multipack_buffer_size:
            furthest_behind = min(range(len(taken)), key=lambda s: taken[s] / weights[s])
            drawn = self.sources[furthest_behind].draw(tally)
            documents += drawn
            num_drawn = sum(len(ids) for ids, _ in drawn)
            num_tokens += num_drawn
            taken[furthest_behind] += num_drawn if self.section.mix_by == "tokens" else 1
        return documents

    def _pack(self, documents: list[Document], block: int) -> list[StreamRow]:
        lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
        members, starts = best_fit_decreasing(lengths, self.section.sequence_len)
        order = row_order(derive_seed(self.seed, 0xB14C, block), 0, len(starts) - 1)
        return [[documents[m] for m in members[starts[i] : starts[i + 1]]] for i in order]

    def _require_few_dropped(self, counts: Counter[str]) -> None:
        share = dropped_share(counts)
        if share > self.section.max_dropped_fraction:
            listed = f"\nThey are listed in {self.listing.path}" if self.listing.path is not None else ""
            raise DataError(
                f"{share:.1%} of the {counts[READ]:,} rows read so far are dropped, and max_dropped_fraction "
                f"allows {self.section.max_dropped_fraction:.0%}: {'; '.join(drop_notes(counts))}.{listed}"
            )


def joins_documents(section: DataSection) -> bool:
    """Return whether a stream of these sources joins its documents and cuts them into full rows."""
    return all(entry.is_plain_text for entry in section.datasets)


def section_for_documents(section: DataSection) -> DataSection:
    """Return the section by which a stream makes documents: those that are joined may be longer than sequence_len."""
    return section.model_copy(update={"sequence_len": _NO_LIMIT}) if joins_documents(section) else section


def cut_into_rows(documents: list[Document], length: int) -> tuple[list[StreamRow], list[Document]]:
    """Lay documents end to end and cut them into rows of exactly `length` tokens.

    Returns the rows, and the documents that fill no row. One that crosses a border goes on in the next row.
    """
    rows: list[StreamRow] = []
    row: StreamRow = []
    room = length
    for ids, labels in documents:
        start = 0
        while start < len(ids):
            piece = slice(start, start + room)
            row.append((ids[piece], labels[piece]))
            start += len(ids[piece])
            room -= len(ids[piece])
            if room == 0:
                rows.append(row)
                row, room = [], length
    return rows, row
