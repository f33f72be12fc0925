"""The checkpoints of a run: one folder each, complete or absent, with a manifest of sha256 sums. No pickle: safetensors
and JSON.

A kill while one is written leaves those before it untouched. Their names are those of checkpoint/output_dir.py.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetuner.checkpoint.output_dir import CHECKPOINT
from finetuner.errors import CheckpointError
from finetuner.storage.atomic import staged_folder, staging_of
from finetuner.storage.manifest import MANIFEST, find_damage, seal_folder
from finetuner.training.state import TrainState

STATE = "state.json"


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's state.json: the state of the loop, and the facts of its run (see compatibility.resume_facts)."""

    state: TrainState
    facts: dict[str, Any]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return output_dir / "checkpoints" / f"step-{step:08}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(folder.name.removeprefix("step-"))


@contextmanager
def staged_checkpoint(folder: Path, state: TrainState, facts: dict[str, Any]) -> Iterator[Path]:
    """Yield the folder to write weights and optimizer into; when the block ends, it becomes the checkpoint `folder`.

    Raises CheckpointError if the disk is full; nothing is left of the checkpoint then.
    """
    with explain_full_disk(folder), staged_folder(folder) as staging:
        yield staging
        (staging / STATE).write_text(json.dumps({"state": asdict(state), "facts": facts}, indent=1) + "\n")
        seal_folder(staging)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Raise CheckpointError in place of an error on writing the checkpoint `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free_bytes = shutil.disk_usage(folder.parent.parent).free
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error} ({free_bytes / 1e9:.2f} GB are free there).\n"
            "The checkpoints before it are intact. Make room and start again with resume_from_checkpoint=true."
        ) from error


def read_saved_state(folder: Path) -> SavedState:
    """Read the state of a checkpoint that newest_intact or require_intact passed."""
    saved = json.loads((folder / STATE).read_text())
    return SavedState(TrainState(**saved["state"]), saved["facts"])


def require_intact(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is a checkpoint and every byte of it is as it was written."""
    if not (folder / MANIFEST).exists() and not (folder / STATE).exists():
        raise CheckpointError(
            f"'{folder}' is not a checkpoint. Name one, such as {folder}/checkpoints/step-00000100, or write\n"
            "resume_from_checkpoint=true for the newest one in output_dir."
        )
    damage = find_damage(folder)
    if damage:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {damage}.\n"
            "Write resume_from_checkpoint=true for the newest intact one."
        )


def newest_intact(output_dir: Path, report: Callable[[str], None] = lambda text: None) -> Path | None:
    """Return the newest checkpoint that is not damaged, or None. Each damaged one is reported and passed over."""
    for folder in reversed(list_checkpoints(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        report(f"{folder} is damaged ({damage}); the checkpoint before it is used.")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of all checkpoints, the oldest first."""
    return sorted(CHECKPOINT.found_in(output_dir), key=step_of)


def abandon_checkpoints_after(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints of steps after `step`, where a run resumes; return their new paths.

    They are of another branch or damaged. As the newest they would be resumed from, and this run's would be pruned.
    """
    abandoned = []
    for folder in list_checkpoints(output_dir):
        if step_of(folder) > step:
            target = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            abandoned.append(folder.rename(target))
    return abandoned


def prune(output_dir: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all checkpoints but the newest `keep` and that of `best_step`; a `keep` of 0 deletes none.

    Each is renamed to a staging folder first, so that a kill leaves no half checkpoint under its name."""
    for folder in list_checkpoints(output_dir)[:-keep] if keep else []:
        if best_step is not None and folder == checkpoint_folder(output_dir, best_step):
            continue
        doomed = staging_of(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)
