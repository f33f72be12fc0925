"""`finetuner push`: upload a result to the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from finetuner.console import Screen
from finetuner.errors import ModelError, RecipeError
from finetuner.export.hub import require_hub, upload_result
from finetuner.recipe import load

if TYPE_CHECKING:
    pass


def push(target: str, repo_id: str | None, *, public: bool) -> None:
    """Upload an adapter, a trained or a merged model: a folder, or what the run of a recipe left. Raises
    FinetunerError."""
    folder, recipe = Path(target).expanduser(), None
    if folder.suffix in (".yml", ".yaml"):
        recipe = load(target).recipe
        folder = Path(recipe.output.output_dir)
    elif repo_id is None:
        near = (folder / "recipe.yml", folder.parent / "recipe.yml")
        recipe = next((load(path, check_files=False).recipe for path in near if path.exists()), None)
    if not any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
        raise ModelError(f"'{folder}' holds neither an adapter nor a model. Name the folder of a result.")
    repo_id = repo_id or (None if recipe is None else recipe.output.hub_model_id)
    if repo_id is None:
        raise RecipeError("nothing says where to upload to. Name a repository: --to me/my-model")
    require_hub(repo_id)
    private = not public and (recipe is None or recipe.output.hub_private_repo)
    screen = Screen(speaks=True)
    screen.line(f"uploading {folder} to {repo_id} ({'private' if private else 'public'}, if it is new)")
    screen.line(f"done: {upload_result(folder, repo_id, private=private)}")
