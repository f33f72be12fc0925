"""Checkpoints of a run: gathered or sharded, with the position in the rows, and the older ones pruned."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetuner.checkpoint.contents import (
    TrainedModel,
    gather,
    write_checkpoint,
    write_model,
    write_sharded_checkpoint,
)
from finetuner.checkpoint.folder import checkpoint_folder, prune, save_checkpoint
from finetuner.data.train_loader import TrainLoader
from finetuner.parallel.launch import by_main_rank
from finetuner.recipe.sections import OutputSection
from finetuner.storage.atomic import staging_of
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

    def save(self, state: TrainState, stops: bool) -> None:
        """Write the checkpoint of `state`. Called by all ranks together; `stops`: the run was asked to stop."""
        self._announce()
        output_dir = Path(self.section.output_dir)
        model_only = self.section.save_only_model and not stops
        folder = checkpoint_folder(output_dir, state.step)
        write = self._writer(folder, model_only=model_only)

        def write_all(staging: Path) -> None:
            write(staging)
            self.loader.write_position(state.step, staging)

        def seal_and_prune() -> None:
            save_checkpoint(folder, state, self.facts | {"model_only": model_only}, write_all)
            prune(output_dir, self.section.save_total_limit, state.best_step if self.keeps_best else None)

        by_main_rank(self.trained.accelerator, seal_and_prune)
        self._announce()

    def _writer(self, folder: Path, *, model_only: bool) -> Callable[[Path], None]:
        """Return what writes the weights on the main rank; the others have done their share when it is returned."""
        if self.sharded:
            write = partial(write_sharded_checkpoint, self.trained, model_only=model_only)
            if not self.trained.accelerator.is_main_process:
                write(staging_of(folder))
            return write
        gathered = gather(self.trained, optimizer=not model_only)
        if model_only:
            return partial(write_model, self.trained, gathered.model)
        return partial(write_checkpoint, self.trained, gathered)

    def _announce(self) -> None:
        for observer in self.observers:
            observer.saving()
