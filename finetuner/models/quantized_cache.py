"""A base in 4 bits, as a file: the next start reads the packed bytes and quantises nothing."""

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from finetuner.errors import ModelError
from finetuner.storage.safetensors_stream import TensorFile, TensorInfo, read_header, read_tensor


class PackedCache:
    """<folder>/<key>.safetensors: written aside while the model loads for the first time, and renamed when complete.

    Of several processes that load at once, the one that has the lock writes.
    """

    def __init__(self, folder: Path, key: str, infos: Mapping[str, TensorInfo]) -> None:
        """Raises ModelError if the folder cannot be written to or the disk is too full for it."""
        self.path = folder / f"{key}.safetensors"
        self.stored = self._header()
        self.file: TensorFile | None = None
        if self.stored:
            return
        aside = self.path.with_suffix(".tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends
            except BlockingIOError:
                return
            aside.unlink(missing_ok=True)  # left by a kill
            needed, free = sum(info.num_bytes for info in infos.values()), shutil.disk_usage(folder).free
            if needed > free:
                raise ModelError(
                    f"the quantised model needs {needed / 1e9:.2f} GB in '{folder}', which has {free / 1e9:.2f} free.\n"
                    "Make room, name a folder on another disk (dataset_prepared_path), or write "
                    "`quantized_cache: false`."
                )
            self.file = TensorFile(aside, infos)
        except OSError as error:
            raise ModelError(
                f"cannot write the quantised model to '{folder}': {error.strerror}.\n"
                "Name a folder that you may write to (dataset_prepared_path), or write `quantized_cache: false`."
            ) from error

    def _header(self) -> dict[str, TensorInfo]:
        """What is there; nothing if there is no file, or a disk has lost its end."""
        try:
            return read_header(self.path)
        except (OSError, ModelError):
            return {}

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.path, self.stored[name])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ModelError if the disk is full."""
        if self.file is None:
            return
        try:
            self.file.write(name, tensor)
        except OSError as error:
            self.file.path.unlink(missing_ok=True)
            raise ModelError(
                f"cannot write the quantised model to '{self.path.parent}': {error.strerror}.\n"
                "Make room, or write `quantized_cache: false`."
            ) from error

    def close(self) -> None:
        """Give the file its name, if every tensor is in it."""
        if self.file is None:
            return
        assert not self.file.missing
        self.file.close()
        self.file.path.replace(self.path)
        self.file = None
        os.close(self.lock)
