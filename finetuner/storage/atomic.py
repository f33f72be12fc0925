"""Files and folders that are complete or absent, whenever the process is killed or the power fails.

Each is written to a staging file or folder next to its place, flushed to the disk, and renamed. Who finds a staging
folder knows that a kill left it. Only one process may stage a name at a time; where more could try, the caller
holds a lock (storage/locks.py). Every function raises OSError as the system does.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TASK = "work.json"  # in a staging folder that can be resumed: what is being written into it


def staging_of(path: Path) -> Path:
    """Path of the staging folder of `path`, in the same folder so that a rename is enough."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def staged_folder(folder: Path, *, task: str | None = None, staging: Path | None = None) -> Iterator[Path]:
    """Yield an empty staging folder that replaces `folder` when the block ends, and is removed if the block fails.

    `task` says in full what is to be written. If a kill or Ctrl-C left a staging folder of the same task, that one is
    yielded with the files in it, and its writer goes on after them. `staging` is another place for the staging folder
    than `staging_of(folder)`.
    """
    staging = staging or staging_of(folder)
    if task is None or not (staging / TASK).exists() or (staging / TASK).read_text() != task:
        shutil.rmtree(staging, ignore_errors=True)  # left by a kill
        staging.mkdir(parents=True)
        if task is not None:
            (staging / TASK).write_text(task)
    try:
        yield staging
        (staging / TASK).unlink(missing_ok=True)
        _follow_umask(staging)
        _flush_tree(staging)
        _replace_folder(staging, folder)
    except BaseException as error:
        if task is None or not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _replace_folder(staging: Path, folder: Path) -> None:
    replaced = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    staging.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def staged_file(path: Path, *, staging: Path | None = None, flushes: bool = True) -> Iterator[Path]:
    """Yield the path of a staging file that replaces `path` when the block ends, and is removed if the block fails.

    `staging` is another place for it than `path` with ".tmp" after its name. Without `flushes` many small files are
    written quickly, and a power cut may leave one empty: its reader has to check.
    """
    staging = staging or path.with_name(f"{path.name}.tmp")
    try:
        yield staging
        if flushes:
            replace_file(staging, path)
        else:
            staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def replace_file(staging: Path, path: Path) -> None:
    """Give the file `staging` the name `path`, once it is on the disk."""
    _flush_file(staging)
    staging.replace(path)
    flush_folder(path.parent)


def move_into(source: Path, folder: Path, last: str) -> None:
    """Move all that is in `source` into `folder`, each in place of its namesake. The file named `last` is removed
    first and moved last: if it exists, all do."""
    (folder / last).unlink(missing_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)  # no rename replaces a folder with files
        if path.name != last:
            path.replace(folder / path.name)
    flush_folder(folder)
    (source / last).replace(folder / last)
    flush_folder(folder)


def _follow_umask(folder: Path) -> None:
    """safetensors makes files that only their owner can read, whatever the umask says."""
    probe = folder / ".probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_folder(path)
        else:
            _flush_file(path)
    flush_folder(folder)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk: a rename is lost in a power cut until then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and shared file systems cannot do it
            raise
    finally:
        os.close(handle)
