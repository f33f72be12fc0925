"""The output folder: one run at a time, and nothing of an earlier run overwritten unasked."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuner.errors import CheckpointError

LOCK = ".lock"
METRICS = "metrics.jsonl"  # the sign that a run of ours wrote here
# What a run writes beside checkpoints and merged. Nothing else in the folder is ever touched.
RUN_FILES = (
    METRICS,
    "recipe.yml",
    "dropped.jsonl",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "quantization.json",
)
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MODEL_FILES = ("config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json")


@contextmanager
def claimed(folder: Path, *, replaces: bool) -> Iterator[None]:
    """Hold the folder for the length of a run. Nothing in it is changed by that.

    Raises CheckpointError if it cannot be written to, if another run holds it, if it has an earlier run's files and the
    recipe does not say that they may be replaced, or if it holds a model that no run wrote.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to output_dir '{folder}': {error.strerror}.\n"
            "Name a folder that you may write to: output_dir=..."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process dies
        except OSError as error:
            raise CheckpointError(
                f"another run is writing to '{folder}' at this moment.\nName another folder: output_dir=..."
            ) from error
        ours = (folder / METRICS).exists()
        found = [name for name in MODEL_FILES if (folder / name).exists()]
        if found and not ours:
            raise CheckpointError(
                f"'{folder}' holds a model that no run wrote there ({found[0]}).\nName another folder: output_dir=..."
            )
        if ours and not replaces:
            raise CheckpointError(
                f"'{folder}' holds an earlier run. Write one of:\n"
                "  resume_from_checkpoint=true   to go on with it\n"
                "  output_dir=ANOTHER            to keep it and start anew\n"
                "  overwrite_output_dir=true     to delete it and start anew"
            )
        yield
    finally:
        os.close(handle)


def remove_run_files(folder: Path, keep: Path) -> None:
    """Delete what an earlier run of ours wrote, and nothing else; `keep` is the recipe that is being run."""
    if not (folder / METRICS).exists():
        return
    files = [folder / name for name in RUN_FILES] + [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]
    for path in files:
        if path.is_file() and path.resolve() != keep.resolve():
            path.unlink()
    whole = [path for path in (folder / "checkpoints").glob("*step-*") if (path / "state.json").exists()]
    merged = [folder / "merged"] if (folder / "merged" / "merge.json").exists() else []
    events = folder / "tensorboard"
    ours = events.is_dir() and all(path.name.startswith("events.out.tfevents") for path in events.iterdir())
    for path in whole + merged + ([events] if ours else []):
        shutil.rmtree(path)


def require_space(folder: Path, checkpoint_bytes: int, count: int) -> None:
    """Raises CheckpointError if `count` checkpoints would not fit beside what else is on the disk, counting those that
    are there already as room."""
    there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    needed = checkpoint_bytes * count - there
    if needed > free:
        raise CheckpointError(
            f"{count} checkpoints of {_size(checkpoint_bytes)} need {_size(needed)} more, and '{folder}' has "
            f"{_size(free)} free.\n"
            "Keep fewer (save_total_limit=1), make room, or name a folder on another disk: output_dir=..."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def move_into(source: Path, folder: Path, last: str) -> None:
    """Move every file of `source` into `folder`, each replacing its namesake whole; `last` goes last, as the sign that
    all are there."""
    (folder / last).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == last):
        path.replace(folder / path.name)
