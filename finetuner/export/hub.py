"""Upload of a run's result to the hub. The token is huggingface_hub's own: `hf auth login` or HF_TOKEN."""

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from finetuner.checkpoint.output_dir import ADAPTER, MODEL, OUTPUT_FILES
from finetuner.errors import PlanError, TrainingError
from finetuner.models.files import INDEX

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def require_hub(repo_id: str | None) -> None:
    """Raises PlanError if an upload to `repo_id` is certain to fail. To be called before anything is loaded."""
    if repo_id is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PlanError(f"hub_model_id '{repo_id}' is no name of a repository: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise PlanError("hub_model_id asks for an upload, and HF_HUB_OFFLINE forbids it. Unset one of them.")
    if get_token() is None:
        raise PlanError(
            "hub_model_id asks for an upload, and there is no token. Type `hf auth login`, or set HF_TOKEN."
        )


def result_files(folder: Path) -> list[str]:
    """Return the sorted names of the result's files in `folder`: those that OUTPUT_FILES says are uploaded, and the
    weights that an index names, since a merged model's are called as its base's are.

    Anything else stays here: checkpoints, logs, files of yours, and merge.json, which has paths of this machine.
    """
    found = {path for kind in OUTPUT_FILES if kind.is_uploaded for path in kind.found_in(folder)}
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        found |= {folder / name for name in weight_map.values()}
    return sorted(path.name for path in found if path.is_file())


def files_in_repository(api: "HfApi", repo_id: str) -> list[str]:
    """Return the paths of all files of a repository of a model."""
    return [file.rfilename for file in api.model_info(repo_id).siblings or ()]


def stale_weights(in_repository: Iterable[str], uploaded: Container[str]) -> list[str]:
    """Return the files of a model's weights in a repository that an upload does not replace: a loader may prefer them.

    A checkpoint in fp32 has more files than its result in bf16, and an index that names them.
    """
    weights = (name for kind in (ADAPTER, MODEL) for name in in_repository if kind.has_name(name))
    return sorted(name for name in weights if name not in uploaded and (".safetensors" in name))


def upload_result(folder: Path, repo_id: str, *, private: bool, replaces: bool = False) -> str:
    """Upload the `result_files` of `folder` alone, and return the repository's address.

    `replaces`: weights of an earlier save there, which these files do not overwrite, are deleted.
    Raises TrainingError if that fails; nothing on this disk is lost by it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        files = result_files(folder)
        old = stale_weights(files_in_repository(api, repo_id), files) if replaces else []
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            ignore_patterns=["*/*"],  # a pattern's star takes slashes too
            delete_patterns=old or None,
            commit_message="Trained with finetuner",
        )
    except Exception as error:  # of its network library, of its own, of the disk: all mean the same here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the result could not be uploaded to '{repo_id}': {first}\n"
            f"It is complete in {folder}. Try once more (what has arrived is not sent again):\n"
            f"  finetuner push {folder} --to {repo_id}{'' if private else ' --public'}"
        ) from error
    return f"{api.endpoint}/{repo_id}"
