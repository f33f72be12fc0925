"""Where the batches of a step come from: the prepared rows, or a stream; made while the step before is computed."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetuner.data.batches import Batch, Layout, dealt, step_batches
from finetuner.data.remote_files import Patience
from finetuner.data.row_stream import RowStream, StreamState
from finetuner.data.streaming_source import FileFacts
from finetuner.data.token_store import Rows
from finetuner.errors import CheckpointError
from finetuner.plan.run import Plan
from finetuner.plan.schedule import Schedule
from finetuner.recipe.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STREAM_FILE = "stream.json"


class Feed(Protocol):
    """The training rows, as batches."""

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""

    def write_position(self, step: int, folder: Path) -> None:
        """Write what a checkpoint needs to go on with that step, if it needs anything."""

    def close(self) -> None:
        """End what runs beside."""

    def lost(self) -> tuple[int, list[str]]:
        """How many rows were read while training, and what became of those that are not learned as they stand."""


@dataclass(frozen=True)
class StoreFeed:
    """Prepared rows: any step at any time, so that nothing needs to be kept."""

    rows: Rows
    plan: Plan
    schedule: Schedule
    layout: Layout

    def batches(self, step: int) -> list[Batch]:
        return step_batches(self.rows, self.plan, self.schedule, step, self.layout)

    def write_position(self, step: int, folder: Path) -> None:
        """The step is enough."""

    def close(self) -> None:
        """Nothing runs beside."""

    def lost(self) -> tuple[int, list[str]]:
        """They were prepared: all is said before the first step."""
        return 0, []


@dataclass(frozen=True)
class StreamFeed:
    """Rows of a stream, in its order: step by step."""

    stream: RowStream
    plan: Plan
    layout: Layout

    def batches(self, step: int) -> list[Batch]:
        first = self.plan.rows_before(step)
        rows = self.stream.rows(first, self.plan.rows_before(step + 1) - first)
        longest_first = sorted(range(len(rows)), key=rows.length, reverse=True)
        return dealt(rows, longest_first, self.plan, self.layout)

    def write_position(self, step: int, folder: Path) -> None:
        state = self.stream.state_at(self.plan.rows_before(step))
        facts = {"state": asdict(state), "files": self.stream.files}
        (folder / STREAM_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def close(self) -> None:
        self.stream.close()

    def lost(self) -> tuple[int, list[str]]:
        return self.stream.num_read, self.stream.notes


def build_feed(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    plan: Plan,
    schedule: Schedule,
    layout: Layout,
    checkpoint: Path | None,
    *,
    listed: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Feed:
    """The training rows: prepared, or streamed from where the checkpoint was.

    Of a stream, `listed` is the file that lists the rows that are not learned, and `say` is told of connections that
    break. Raises DataError if a source cannot be read, and CheckpointError if it is not what it was.
    """
    if not section.streaming:
        return StoreFeed(rows, plan, schedule, layout)
    state, files = read_position(checkpoint) if checkpoint is not None else (None, None)
    stream = RowStream(
        section, tokenizer, plan.seed,
        packing=layout.packed, state=state, listed=listed, patience=Patience(say), ahead=True,
    )  # fmt: skip
    if files is not None:
        for entry, before, now in zip(section.datasets, files, stream.files, strict=True):
            require_same_files(entry.path, before, now)
    return StreamFeed(stream, plan, layout)


def read_position(folder: Path) -> tuple[StreamState, list[list[FileFacts]]]:
    """What write_position wrote. Raises CheckpointError if it is not there."""
    try:
        facts = json.loads((folder / STREAM_FILE).read_text(encoding="utf-8"))
        return StreamState(**facts["state"]), facts["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {folder} does not say where its stream of rows was.") from error


def require_same_files(source: str, before: list[FileFacts], now: list[FileFacts]) -> None:
    """Raises CheckpointError unless a source is what it was: a place in its rows would mean other rows."""
    if before == now:
        return
    names = [[name for name, *_ in facts] for facts in (before, now)]
    if names[0] != names[1]:
        gone = [name for name in names[0] if name not in names[1]]
        new = [name for name in names[1] if name not in names[0]]
        what = "; ".join(f"{word}: {', '.join(some[:5])}" for word, some in (("gone", gone), ("new", new)) if some)
        raise CheckpointError(
            f"the files of '{source}' are not those of the checkpoint ({what or 'in another order'}), so its place in "
            f"the rows is lost.\n{_AS_IT_WAS}"
        )
    (name, size, version), (_, new_size, new_version) = next(
        pair for pair in zip(before, now, strict=True) if pair[0] != pair[1]
    )
    sizes = f"{size:,} -> {new_size:,} bytes" if None not in (size, new_size) and size != new_size else None
    of_disk = isinstance(version, int)
    versions = " -> ".join(_day(one) if of_disk else str(one) for one in (version, new_version))
    message = f"'{name}' of '{source}' has changed since the checkpoint ({sizes or versions}).\n{_AS_IT_WAS}"
    if of_disk and sizes is None:
        message += f"\nIf only its time is another, as a copy's is: touch -d '{_day(version)}' {name}"
    raise CheckpointError(message)


_AS_IT_WAS = "Put back what was there, or start anew with another output_dir."


def _day(nanoseconds: int) -> str:
    """As `touch -d` reads it, to the nanosecond."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


class Prefetched:
    """Gives the batches of a step, and has those of the next one made by a thread of its own."""

    def __init__(self, make: Callable[[int], list[Batch]], total_steps: int, *, pin: bool, pool: ThreadPoolExecutor):
        """`pin`: in memory that a GPU can read by itself, so that copying does not hold up the CPU."""
        self.make, self.total_steps, self.pin, self.pool = make, total_steps, pin, pool
        self.ahead: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        is_ready = self.ahead is not None and self.ahead[0] == step
        batches = self.ahead[1].result() if self.ahead is not None and is_ready else self._made(step)
        if step + 1 < self.total_steps:
            self.ahead = (step + 1, self.pool.submit(self._made, step + 1))
        return batches

    def _made(self, step: int) -> list[Batch]:
        batches = self.make(step)
        return [batch.pinned() for batch in batches] if self.pin else batches


@contextmanager
def prefetched(feed: Feed, total_steps: int, *, pin: bool) -> Iterator[Prefetched]:
    """The threads end with the block."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        yield Prefetched(feed.batches, total_steps, pin=pin, pool=pool)
    finally:
        feed.close()  # first: the other thread may be waiting for it
        pool.shutdown(wait=True, cancel_futures=True)
