"""The output folder: one run at a time, and nothing of an earlier run overwritten unasked."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuner.errors import CheckpointError

LOCK = ".lock"
# What a run writes. Nothing else in the folder is ever touched.
RUN_FILES = ("metrics.jsonl", "recipe.yml", "adapter_model.safetensors", "adapter_config.json", "checkpoints", "merged")


@contextmanager
def claimed(folder: Path, *, resumes: bool, overwrite: bool) -> Iterator[None]:
    """Hold the folder for the length of a run.

    Raises CheckpointError if it cannot be written to, if another run holds it, or if it has an earlier run's files and
    the recipe neither resumes nor overwrites.
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
        if overwrite:
            remove_run_files(folder)
        elif not resumes and (folder / "metrics.jsonl").exists():
            raise CheckpointError(
                f"'{folder}' holds an earlier run. Write one of:\n"
                "  resume_from_checkpoint=true   to go on with it\n"
                "  output_dir=ANOTHER            to keep it and start anew\n"
                "  overwrite_output_dir=true     to delete it and start anew"
            )
        yield
    finally:
        os.close(handle)


def remove_run_files(folder: Path) -> None:
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises CheckpointError if `num_bytes` more do not fit; checked before a run costs anything."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(
            f"a checkpoint of this run needs {num_bytes / 1e9:.2f} GB, and '{folder}' has {free / 1e9:.2f} GB free.\n"
            "Make room, or name a folder on another disk: output_dir=..."
        )


def move_into(source: Path, folder: Path, last: str) -> None:
    """Move every file of `source` into `folder`, each replacing its namesake whole; `last` goes last, as the sign that
    all are there."""
    (folder / last).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == last):
        path.replace(folder / path.name)
