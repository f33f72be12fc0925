"""Folders that one process of each node builds, and every rank and every later start uses."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from finetuner.storage.atomic import staged_folder
from finetuner.storage.locks import exclusive_lock

POLL_SECONDS = 0.3


def build_once(folder: Path, fill: Callable[[Path], None], *, is_builder: bool, mark: str | None = None) -> Path:
    """Return `folder` once it exists, and has the file `mark` in it if one is named.

    If it is missing, a builder writes it: `fill` gets a staging folder that is renamed to `folder`. Of several builders
    at once, the first builds and the others wait for its lock file, `folder` with ".lock" after its name. Ranks that
    are no builder look for the folder, in no collective that could time out. Raises OSError if it cannot be written,
    and what `fill` raises; nothing is left then.
    """
    complete = folder if mark is None else folder / mark
    while not complete.exists():
        if not is_builder:
            time.sleep(POLL_SECONDS)
            continue
        with exclusive_lock(folder.with_name(f"{folder.name}.lock")):
            if not complete.exists():
                _build(folder, fill)
    return folder


def _build(folder: Path, fill: Callable[[Path], None]) -> None:
    # The host's name, because nodes may share a disk that does not share locks.
    prefix = f"{folder.name}.{platform.node()}"
    for staging in folder.parent.glob(f"{prefix}.*.tmp"):  # of a process that was killed: this one has the lock
        shutil.rmtree(staging, ignore_errors=True)
    with staged_folder(folder, staging=folder.with_name(f"{prefix}.{os.getpid()}.tmp")) as staging:
        fill(staging)
