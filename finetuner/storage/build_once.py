"""Folders that are made once and used by every rank and every later start."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from finetuner.errors import ModelError
from finetuner.world import World

POLL_SECONDS = 0.3


def made_once(folder: Path, make: Callable[[Path], None], world: World) -> Path:
    """The folder, which `make` fills aside before it takes its name: it is whole or not there.

    The first rank of each node makes it if it is missing, and the others look for it, in no collective that could time
    out. Safe for any number of processes at once. Raises ModelError if it cannot be written.
    """
    if world.local_rank != 0:
        while not folder.exists():
            time.sleep(POLL_SECONDS)
        return folder
    if folder.exists():
        return folder
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel lets go of it when the process dies
            if not folder.exists():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                make(aside)
                aside.rename(folder)
        finally:
            os.close(handle)
    except OSError as error:
        raise ModelError(
            f"cannot write to '{folder.parent}': {error.strerror}.\n"
            "Make room, or name another folder: dataset_prepared_path=..."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
