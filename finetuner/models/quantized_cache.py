"""A base model in 4 bits as one file, so that the next start reads the packed bytes and quantizes nothing."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from finetuner.errors import ModelError
from finetuner.storage.atomic import replace_file
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.storage.locks import exclusive_lock
from finetuner.storage.safetensors_stream import TensorFile, TensorInfo, read_header, read_tensor


class PackedCache:
    """<folder>/<key>.safetensors: written to a staging file while the model loads for the first time, and renamed when
    it is complete.

    Of several processes that load at once, the one that has the lock file writes, and the others write nothing.
    """

    def __init__(self, folder: Path, key: str, infos: Mapping[str, TensorInfo]) -> None:
        """Raise ModelError if the folder cannot be written to or the disk is too full for it."""
        self.path = folder / f"{key}.safetensors"
        self.stored = self._header()
        self.file: TensorFile | None = None
        self.lock = ExitStack()
        if self.stored:
            return
        staging = self.path.with_suffix(".tmp")
        with explain_disk_errors(
            ModelError,
            f"cannot write the quantized model to '{folder}'",
            "Name a folder that you may write to (dataset_prepared_path), or write `quantized_cache: false`.",
        ):
            if not self.lock.enter_context(exclusive_lock(self.path.with_suffix(".lock"), wait=False)):
                return
            staging.unlink(missing_ok=True)  # left by a kill
            needed_bytes = sum(info.num_bytes for info in infos.values())
            free_bytes = shutil.disk_usage(folder).free
            if needed_bytes > free_bytes:
                raise ModelError(
                    f"the quantized model needs {needed_bytes / 1e9:.2f} GB in '{folder}', which has "
                    f"{free_bytes / 1e9:.2f} free.\n"
                    "Make room, name a folder on another disk (dataset_prepared_path), or write "
                    "`quantized_cache: false`."
                )
            self.file = TensorFile(staging, infos)

    def _header(self) -> dict[str, TensorInfo]:
        """Names and infos of the stored tensors; none if there is no file, or a disk has lost its end."""
        try:
            return read_header(self.path)
        except (OSError, ModelError):
            return {}

    def read(self, name: str) -> torch.Tensor:
        """Read one stored tensor, of the shape that `stored` has for it, to the CPU."""
        return read_tensor(self.path, self.stored[name])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of the shape that `infos` has for it. Raises ModelError if the disk is full."""
        if self.file is None:
            return
        try:
            with explain_disk_errors(
                ModelError,
                f"cannot write the quantized model to '{self.path.parent}'",
                "Make room, or write `quantized_cache: false`.",
            ):
                self.file.write(name, tensor)
        except ModelError:
            self.file.path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Rename the file to its final name. Every tensor must have been written."""
        if self.file is None:
            return
        assert not self.file.missing
        self.file.close()
        replace_file(self.file.path, self.path)
        self.file = None
        self.lock.close()
