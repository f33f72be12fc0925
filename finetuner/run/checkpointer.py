"""Checkpoints of a run: gathered or sharded, with the position in the rows, and the older ones pruned."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetuner.checkpoint.contents import (
    TrainedModel,
    gather,
    write_checkpoint,
    write_model,
    write_share_of_checkpoint,
)
from finetuner.checkpoint.folder import checkpoint_folder, explain_full_disk, prune, staged_checkpoint
from finetuner.data.train_loader import TrainLoader
from finetuner.export.step_uploads import StepUploads
from finetuner.parallel.launch import by_every_rank, by_main_rank
from finetuner.recipe.sections import OutputSection
from finetuner.training.observers import Observer
from finetuner.training.state import TrainState


@dataclass(frozen=True)
class Checkpointer:
    """Writes checkpoints of `trained` into the output folder. `facts`: see checkpoint/compatibility.py."""

    trained: TrainedModel
    section: OutputSection
    sharded: bool
    keeps_best: bool
    loader: TrainLoader
    facts: dict[str, Any]
    observers: tuple[Observer, ...]
    uploads: StepUploads | None = None

    def save(self, state: TrainState, stops: bool) -> None:
        """Write the checkpoint of `state`. Called by all ranks together; `stops`: the run was asked to stop."""
        self._announce()
        accelerator = self.trained.accelerator
        model_only = self.section.save_only_model and not stops
        folder = checkpoint_folder(Path(self.section.output_dir), state.step)
        write = None if self.sharded else self._gathered_writer(model_only=model_only)
        with ExitStack() as stack:  # holds the staging folder, on the main rank
            staged = staged_checkpoint(folder, state, self.facts | {"model_only": model_only})
            staging = by_main_rank(accelerator, lambda: stack.enter_context(staged))
            if self.sharded:
                by_every_rank(accelerator, lambda: self._write_share(folder, staging, model_only=model_only))

            def finish() -> None:
                if write is not None:
                    write(staging)
                self.loader.write_position(state.step, staging)
                stack.close()
                prune(
                    Path(self.section.output_dir),
                    self.section.save_total_limit,
                    state.best_step if self.keeps_best else None,
                )

            by_main_rank(accelerator, finish)
        if self.uploads is not None and not stops:  # a run that is asked to stop has no time for it
            self.uploads.start(folder, state.step)
        self._announce()

    def _write_share(self, folder: Path, staging: Path, *, model_only: bool) -> None:
        with explain_full_disk(folder):
            write_share_of_checkpoint(self.trained, staging, model_only=model_only)

    def _gathered_writer(self, *, model_only: bool) -> Callable[[Path], None]:
        """Gather weights and optimizer from all ranks; return what the main rank writes them with."""
        gathered = gather(self.trained, optimizer=not model_only)
        if model_only:
            return partial(write_model, self.trained, gathered.model)
        return partial(write_checkpoint, self.trained, gathered)

    def _announce(self) -> None:
        for observer in self.observers:
            observer.saving()


@contextmanager
def step_uploads(section: OutputSection, *, is_main: bool, say: Callable[[str], None]) -> Iterator[StepUploads | None]:
    """Yield the uploads that the recipe asks for at each save, on the main rank; None for none.

    Leaves when the last one has ended, or at once if the run is cut off.
    """
    if section.hub_model_id is None or section.hub_strategy != "every_save" or not is_main:
        yield None
        return
    uploads = StepUploads(section.hub_model_id, private=section.hub_private_repo, say=say)
    try:
        yield uploads
    except BaseException:
        uploads.close(waits=False)
        raise
    uploads.close(waits=True)
