"""Uploads of what a run has at each save, beside the training: a network that fails costs an upload and no step."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.errors import PlanError
from finetuner.export.hub import files_in_repository, result_files, stale_weights
from finetuner.recipe.sections import OutputSection

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SECONDS_BETWEEN = (5.0, 30.0)  # tries; there is one more try than there are pauses


class StepUploads:
    """One upload at a time, in a thread. A save that comes while one goes on is left out: the next one has its weights.

    Of a checkpoint's folder goes what a result may have (export/hub.py), never the optimizer's state, the position in
    the rows or anything else. `say` gets a line for each that arrived or was given up.
    """

    def __init__(
        self, repo_id: str, *, private: bool, say: Callable[[str], None], pauses: tuple[float, ...] = _SECONDS_BETWEEN
    ) -> None:
        self.repo_id, self.private, self.say, self.pauses = repo_id, private, say, pauses
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()

    def start(self, folder: Path, step: int) -> None:
        """Upload the checkpoint in `folder`, which is complete, while the caller goes on."""
        if self._thread is not None and self._thread.is_alive():
            self.say(f"note: step {step} is not uploaded: the upload before it is not done yet")
            return
        files = ExitStack()
        # Opened now: a later save may delete this checkpoint, and what is open stays readable.
        opened = {name: files.enter_context((folder / name).open("rb")) for name in result_files(folder)}
        self._thread = threading.Thread(target=self._run, args=(files, opened, step), name="upload", daemon=True)
        self._thread.start()

    def close(self, *, waits: bool) -> None:
        """Try no more; with `waits`, come back when the upload in flight has ended."""
        self._ends.set()
        if waits and self._thread is not None:
            self._thread.join()

    def _run(self, files: ExitStack, opened: dict[str, Any], step: int) -> None:
        from huggingface_hub import HfApi

        with files:
            for pause in (*self.pauses, None):
                try:
                    self._commit(HfApi(), opened, step)
                except Exception as error:  # of its network library, of its own, of the disk: all mean the same here
                    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    if pause is None or self._ends.wait(pause):
                        self.say(f"warning: step {step} could not be uploaded to '{self.repo_id}': {first}")
                        return
                else:
                    self.say(f"step {step} is uploaded to {self.repo_id}")
                    return

    def _commit(self, api: "HfApi", opened: dict[str, Any], step: int) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        old = stale_weights(files_in_repository(api, self.repo_id), opened)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in old]
        for name, file in opened.items():
            file.seek(0)
            operations.append(CommitOperationAdd(name, file))
        api.create_commit(self.repo_id, operations, commit_message=f"Training in progress, step {step}")


def require_whole_checkpoints(section: OutputSection, *, sharded: bool) -> None:
    """Raise PlanError for uploads at each save of checkpoints that no other tool can read."""
    if section.hub_model_id is not None and section.hub_strategy == "every_save" and sharded:
        raise PlanError(
            "hub_strategy: every_save uploads whole weights, and each rank saves its shards here.\n"
            "Write `hub_strategy: end`, or `state_dict_type: FULL_STATE_DICT` in fsdp_config."
        )
