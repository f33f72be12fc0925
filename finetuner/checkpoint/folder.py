"""Checkpoints that are whole or absent, and the output folder they live in.

A checkpoint is written to a temporary folder, every file and the folder flushed to disk, a manifest of sha256 sums
last, and only then renamed to its name: a kill at any moment leaves the one before it untouched. No pickle:
safetensors and JSON.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuner.errors import CheckpointError
from finetuner.training.state import TrainState

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 20


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself."""

    state: TrainState
    facts: dict[str, Any]  # what the run was: see run.resume_facts


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:08}"


def save_checkpoint(
    folder: Path, state: TrainState, facts: dict[str, Any], write_weights: Callable[[Path], None]
) -> None:
    """`write_weights(folder)` writes models and optimizer. Raises CheckpointError if the disk is full."""
    with written_aside(folder) as aside:
        try:
            write_weights(aside)
            (aside / "state.json").write_text(json.dumps({"state": asdict(state), "facts": facts}, indent=1) + "\n")
            seal(aside)
        except OSError as error:
            free = shutil.disk_usage(aside).free
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {error} ({free / 1e9:.2f} GB are free there).\n"
                "The checkpoints before it are whole. Make room and start again with resume_from_checkpoint=true."
            ) from error


def aside_of(folder: Path) -> Path:
    """Where `folder` is written before it takes its name."""
    return folder.with_name(f".{folder.name}.tmp")


WORK = "work.json"


@contextmanager
def written_aside(folder: Path, work: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and vanishes otherwise.

    With `work`, which says in full what is to be written, the temporary folder that a kill or Ctrl-C left of the same
    work is gone on with.
    """
    aside = aside_of(folder)
    if work is None or not (aside / WORK).exists() or (aside / WORK).read_text() != work:
        shutil.rmtree(aside, ignore_errors=True)  # left by a kill
        aside.mkdir(parents=True)
        if work is not None:
            (aside / WORK).write_text(work)
    try:
        yield aside
        (aside / WORK).unlink(missing_ok=True)
        _follow_the_umask(aside)
        before = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)
        aside.rename(folder)
        _flush_folder(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException as error:
        if work is None or not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _follow_the_umask(folder: Path) -> None:
    """safetensors makes its files readable by their owner alone, whatever the umask says."""
    probe = folder / ".probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def seal(folder: Path) -> None:
    """Flush every file to disk and write the manifest."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sums[str(path.relative_to(folder))] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": sums}, indent=1) + "\n")
    with manifest.open("rb") as file:
        os.fsync(file.fileno())
    _flush_folder(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every byte is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} of {expected['bytes']} bytes"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def read_saved(folder: Path) -> Saved:
    """What a checkpoint says of itself. Read only what newest_whole or require_whole passed."""
    saved = json.loads((folder / "state.json").read_text())
    return Saved(TrainState(**saved["state"]), saved["facts"])


def require_whole(folder: Path) -> None:
    """Raises CheckpointError unless `folder` is a checkpoint and every byte of it as it was written."""
    if not (folder / MANIFEST).exists() and not (folder / "state.json").exists():
        raise CheckpointError(
            f"'{folder}' is not a checkpoint. Name one, such as {folder}/checkpoints/step-00000100, or write\n"
            "resume_from_checkpoint=true for the newest one in output_dir."
        )
    wrong = damage(folder)
    if wrong:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {wrong}.\nWrite resume_from_checkpoint=true for the newest whole one."
        )


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps than a run goes on from: another branch, or damaged. As the newest, they would
    be resumed from, and the new ones pruned in their place."""
    moved = []
    for folder in list_checkpoints(output_dir):
        if int(folder.name.removeprefix("step-")) > step:
            target = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(folder.rename(target))
    return moved


def newest_whole(output_dir: Path, report: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest checkpoint that is not damaged; each damaged one is reported and passed over."""
    for folder in reversed(list_checkpoints(output_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder
        report(f"{folder} is damaged ({wrong}); the checkpoint before it is used.")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((output_dir / "checkpoints").glob("step-[0-9]*"))


def prune(output_dir: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all but the newest `keep` and the one of `best_step`; 0 keeps all.

    Renamed first: a kill leaves no half checkpoint under its name."""
    for folder in list_checkpoints(output_dir)[:-keep] if keep else []:
        if best_step is not None and folder == checkpoint_folder(output_dir, best_step):
            continue
        doomed = folder.with_name(f".{folder.name}.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
