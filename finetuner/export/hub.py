"""The result of a run, to a repository on the hub. The token is huggingface_hub's own: `hf auth login` or HF_TOKEN."""

from pathlib import Path

from finetuner.errors import PlanError, TrainingError
from finetuner.export.merge_writer import MERGE_FILE

# What a result consists of, by how its files' names end; checkpoints, figures and logs stay here.
RESULT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")


def require_hub(repo_id: str | None) -> None:
    """Raises PlanError, before anything is loaded, if an upload to `repo_id` could not even begin."""
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


def upload_result(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload the result in `folder`, its own files alone, and return its address there.

    Raises TrainingError if that fails; nothing here is lost by it.
    """
    from huggingface_hub import HfApi

    found = (path for path in folder.iterdir() if path.is_file() and path.suffix in RESULT_SUFFIXES)
    names = sorted(path.name for path in found if path.name != MERGE_FILE)  # it has names of folders of this machine
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            ignore_patterns=["*/*"],  # a pattern's star takes slashes too
            commit_message="Trained with finetuner",
        )
    except Exception as error:  # of its network library, of its own, of the disk: all mean the same here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the result could not be uploaded to '{repo_id}': {first}\n"
            f"It is whole in {folder}. Try once more (what has arrived is not sent again):\n"
            f"  finetuner push {folder} --to {repo_id}{'' if private else ' --public'}"
        ) from error
    return f"{api.endpoint}/{repo_id}"
