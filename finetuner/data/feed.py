"""Where the batches of a step come from: the prepared rows, or a stream; made while the step before is computed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetuner.data.batches import Batch, Layout, dealt, step_batches
from finetuner.data.stream import RowStream, StreamState
from finetuner.data.tokens import Rows
from finetuner.errors import CheckpointError
from finetuner.plan import Plan, Schedule
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


@dataclass(frozen=True)
class StreamFeed:
    """Rows of a stream, in its order: step by step."""

    stream: RowStream
    plan: Plan
    layout: Layout

    def batches(self, step: int) -> list[Batch]:
        rows = self.stream.rows(step * self.plan.global_batch, self.plan.global_batch)
        longest_first = sorted(range(len(rows)), key=rows.length, reverse=True)
        return dealt(rows, longest_first, self.plan, self.layout)

    def write_position(self, step: int, folder: Path) -> None:
        state = self.stream.state_at(step * self.plan.global_batch)
        (folder / STREAM_FILE).write_text(state.to_json() + "\n", encoding="utf-8")


def build_feed(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    plan: Plan,
    schedule: Schedule,
    layout: Layout,
    checkpoint: Path | None,
) -> Feed:
    """The training rows: prepared, or streamed from where the checkpoint was."""
    if not section.streaming:
        return StoreFeed(rows, plan, schedule, layout)
    position = read_position(checkpoint) if checkpoint is not None else None
    return StreamFeed(RowStream(section, tokenizer, plan.seed, packing=layout.packed, state=position), plan, layout)


def read_position(folder: Path) -> StreamState:
    """What write_position wrote. Raises CheckpointError if it is not there."""
    try:
        return StreamState.from_json((folder / STREAM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {folder} does not say where its stream of rows was.") from error


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
    """The thread ends with the block."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        yield Prefetched(feed.batches, total_steps, pin=pin, pool=pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
