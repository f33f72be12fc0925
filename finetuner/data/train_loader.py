"""Load the training batches of each step, from prepared rows or from a stream, in a thread one step ahead."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetuner.data.batch_sampler import rank_batches, step_batches
from finetuner.data.batches import Batch, BatchLayout
from finetuner.data.prepare import source_names
from finetuner.data.remote_files import RetryPolicy
from finetuner.data.row_counts import at_a_glance
from finetuner.data.row_stream import RowStream, StreamState
from finetuner.data.streaming_source import FileVersion
from finetuner.data.token_store import TokenRows
from finetuner.errors import CheckpointError
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STREAM_FILE = "stream.json"  # in a checkpoint: the state of the stream, and the files that it read


class TrainLoader(Protocol):
    """The training rows, as the batches of each step."""

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step."""

    def write_position(self, step: int, folder: Path) -> None:
        """Write into a checkpoint's folder what resuming at `step` needs, if it needs anything."""

    def close(self) -> None:
        """Stop the loader's own threads."""

    def dropped_rows(self) -> tuple[int, list[str]]:
        """Return how many rows were read while training, and a note per reason on those dropped, cut or split."""

    def first_rows_at_a_glance(self, step: int) -> list[str]:
        """Return lines on the rows that are read for the first step, where no preparation has counted all rows."""


@dataclass(frozen=True)
class StoredRowsLoader:
    """Loader of prepared rows: any step at any time, so that resuming needs nothing but the step."""

    rows: TokenRows
    plan: Plan
    schedule: Schedule
    layout: BatchLayout

    def batches(self, step: int) -> list[Batch]:
        return step_batches(self.rows, self.plan, self.schedule, step, self.layout)

    def write_position(self, step: int, folder: Path) -> None:
        """Write nothing: the step is enough."""

    def close(self) -> None:
        """Do nothing: there are no threads."""

    def dropped_rows(self) -> tuple[int, list[str]]:
        """Return nothing: the preparation reported dropped rows before the first step."""
        return 0, []

    def first_rows_at_a_glance(self, step: int) -> list[str]:
        """Return nothing: the preparation has counted all rows."""
        return []


@dataclass(frozen=True)
class StreamLoader:
    """Loader of a stream's rows, whose steps must be asked for in order."""

    stream: RowStream
    plan: Plan
    layout: BatchLayout

    def batches(self, step: int) -> list[Batch]:
        first = self.plan.rows_before(step)
        rows = self.stream.rows(first, self.plan.rows_before(step + 1) - first)
        longest_first = sorted(range(len(rows)), key=rows.length, reverse=True)
        return rank_batches(rows, longest_first, self.plan, self.layout)

    def write_position(self, step: int, folder: Path) -> None:
        """Write the stream's state at the first row of `step`, and the versions of its files, to STREAM_FILE."""
        state = self.stream.state_at(self.plan.rows_before(step))
        facts = {"state": asdict(state), "files": self.stream.files}
        (folder / STREAM_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def close(self) -> None:
        self.stream.close()

    def dropped_rows(self) -> tuple[int, list[str]]:
        return self.stream.num_read, self.stream.notes

    def first_rows_at_a_glance(self, step: int) -> list[str]:
        self.stream.rows(self.plan.rows_before(step), 1)
        names = source_names(self.stream.section.datasets)
        return at_a_glance(names, self.stream.first_counts, "the first rows of the stream at a glance")


def build_train_loader(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    rows: TokenRows,
    plan: Plan,
    schedule: Schedule,
    layout: BatchLayout,
    checkpoint: Path | None,
    *,
    dropped_file: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TrainLoader:
    """Return the loader of the training rows: of the prepared `rows`, or of a stream from the checkpoint's position on.

    Only for a stream: `dropped_file` is written with the rows that are not trained on as they are, and `say` is told
    of broken connections. Raises DataError if a source cannot be read, and CheckpointError if its files have changed.
    """
    if not section.streaming:
        return StoredRowsLoader(rows, plan, schedule, layout)
    state, files = read_stream_position(checkpoint) if checkpoint is not None else (None, None)
    stream = RowStream(
        section, tokenizer, plan.seed,
        packing=layout.packed, state=state, dropped_file=dropped_file, retry=RetryPolicy(say), ahead=True,
    )  # fmt: skip
    if files is not None:
        for entry, before, now in zip(section.datasets, files, stream.files, strict=True):
            require_same_files(entry.path, before, now)
    return StreamLoader(stream, plan, layout)


def read_stream_position(folder: Path) -> tuple[StreamState, list[list[FileVersion]]]:
    """Return the state and the file versions in a checkpoint. Raises CheckpointError if they are not there."""
    try:
        facts = json.loads((folder / STREAM_FILE).read_text(encoding="utf-8"))
        return StreamState(**facts["state"]), facts["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {folder} does not say where its stream of rows was.") from error


def require_same_files(source: str, before: list[FileVersion], now: list[FileVersion]) -> None:
    """Raise CheckpointError unless the files of a source are unchanged: its position would mean other rows."""
    if before == now:
        return
    names, new_names = ([name for name, *_ in files] for files in (before, now))
    if names != new_names:
        raise CheckpointError(
            f"the files of '{source}' are not those of the checkpoint ({_list_changes(names, new_names)}), so its "
            f"place in the rows is lost.\n{_RESTORE_FILES}"
        )
    old, new = next(pair for pair in zip(before, now, strict=True) if pair[0] != pair[1])
    raise CheckpointError(_changed_file_message(source, old, new))


def _list_changes(names: list[str], new_names: list[str]) -> str:
    """Return which files are gone and which are new, at most five of each."""
    gone = [name for name in names if name not in new_names]
    new = [name for name in new_names if name not in names]
    changes = [f"{change}: {', '.join(files[:5])}" for change, files in (("gone", gone), ("new", new)) if files]
    return "; ".join(changes) or "in another order"


def _changed_file_message(source: str, old: FileVersion, new: FileVersion) -> str:
    (name, size, version), (_, new_size, new_version) = old, new
    sizes = f"{size:,} -> {new_size:,} bytes" if None not in (size, new_size) and size != new_size else None
    is_local = isinstance(version, int)  # a local file's version is its time
    versions = " -> ".join(_format_time(one) if is_local else str(one) for one in (version, new_version))
    message = f"'{name}' of '{source}' has changed since the checkpoint ({sizes or versions}).\n{_RESTORE_FILES}"
    if is_local and sizes is None:
        message += f"\nIf only its time is another, as a copy's is: touch -d '{_format_time(version)}' {name}"
    return message


_RESTORE_FILES = "Put back what was there, or start again with another output_dir."


def _format_time(nanoseconds: int) -> str:
    """Return a time since the epoch as `touch -d` reads it, to the nanosecond."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


class Prefetcher:
    """A function of the step that returns its batches, and starts to load those of the next step in a thread."""

    def __init__(self, load: Callable[[int], list[Batch]], total_steps: int, *, pin: bool, pool: ThreadPoolExecutor):
        """`pin`: load into page-locked memory, so that copying to a GPU does not hold up the CPU."""
        self.load, self.total_steps, self.pin, self.pool = load, total_steps, pin, pool
        self.ahead: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        is_ready = self.ahead is not None and self.ahead[0] == step
        batches = self.ahead[1].result() if self.ahead is not None and is_ready else self._load(step)
        if step + 1 < self.total_steps:
            self.ahead = (step + 1, self.pool.submit(self._load, step + 1))
        return batches

    def _load(self, step: int) -> list[Batch]:
        batches = self.load(step)
        return [batch.pin_memory() for batch in batches] if self.pin else batches


@contextmanager
def prefetching(loader: TrainLoader, total_steps: int, *, pin: bool) -> Iterator[Prefetcher]:
    """Prefetch a loader's batches; at the end of the block, close it and stop the thread."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        yield Prefetcher(loader.batches, total_steps, pin=pin, pool=pool)
    finally:
        loader.close()  # first: the other thread may be waiting for it
        pool.shutdown(wait=True, cancel_futures=True)
