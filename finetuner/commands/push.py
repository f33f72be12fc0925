"""`finetuner push`: upload a result to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from finetuner.console import Screen
from finetuner.errors import ModelError, RecipeError
from finetuner.export.hub import require_hub, upload_result
from finetuner.recipe import Recipe, load


def push(
    target: Annotated[
        str,
        typer.Argument(metavar="FOLDER|RECIPE", help="An adapter, a merged model, or a recipe.", show_default=False),
    ],
    to: Annotated[str | None, typer.Option("--to", help="The repository; default: the recipe's hub_model_id.")] = None,
    public: Annotated[bool, typer.Option("--public", help="For everyone, if the repository is new.")] = False,
) -> None:
    """Upload an adapter, a trained or a merged model: a folder, or what the run of a recipe left. Raises
    FinetunerError."""
    folder, recipe = _result_of(target, to)
    if not any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
        raise ModelError(f"'{folder}' holds neither an adapter nor a model. Name the folder of a result.")
    repo_id = to or (None if recipe is None else recipe.output.hub_model_id)
    if repo_id is None:
        raise RecipeError("nothing says where to upload to. Name a repository: --to me/my-model")
    require_hub(repo_id)
    private = not public and (recipe is None or recipe.output.hub_private_repo)
    screen = Screen(enabled=True)
    screen.line(f"uploading {folder} to {repo_id} ({'private' if private else 'public'}, if it is new)")
    screen.line(f"done: {upload_result(folder, repo_id, private=private)}")


def _result_of(target: str, repo_id: str | None) -> tuple[Path, Recipe | None]:
    """Return the folder to upload, and the recipe that may say where to: named, or left by the run."""
    folder = Path(target).expanduser()
    if folder.suffix in (".yml", ".yaml"):
        recipe = load(target).recipe
        return Path(recipe.output.output_dir), recipe
    if repo_id is not None:
        return folder, None
    near = (folder / "recipe.yml", folder.parent / "recipe.yml")
    return folder, next((load(path, check_files=False).recipe for path in near if path.exists()), None)
