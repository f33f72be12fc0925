"""The folder and the safetensors files of a model, on this disk or fetched from the hub."""

import json
from pathlib import Path

from finetuner.errors import ModelError

INDEX = "model.safetensors.index.json"


def find_base(base_model: str, *, pickled: bool = False) -> Path:
    """Return the folder of a base model, fetched from the hub if it is not one on this disk.

    Only safetensors are fetched, unless `pickled` weights are wanted where it has no others. Raises ModelError for a
    model that is neither here nor reachable.
    """
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json"]
    try:
        folder = Path(snapshot_download(base_model, allow_patterns=wanted))
        if pickled and not list(folder.glob("*.safetensors")):
            more = ["pytorch_model*.bin", "*.jinja", "*.txt", "*.model"]
            folder = Path(snapshot_download(base_model, allow_patterns=[*wanted, *more]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the base model '{base_model}' is neither a folder nor reachable on the hub: {first}"
        ) from error


def weight_files(base: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in order. Raises ModelError if one is missing."""
    if (base / INDEX).exists():
        names = sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [base / name for name in names]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise ModelError(f"the base model folder '{base}' has no {missing[0]}.{_instead(base)}")
    return files


def _instead(base: Path) -> str:
    """Return a sentence on what the folder has in the place of safetensors, and what to do."""
    if list(base.glob("*.bin")):
        return (
            " It has pickled weights (.bin), which can run code and are not read. Give a folder of safetensors; if you "
            "know who made them, write `pickled_weights: true` in the recipe."
        )
    shards = sorted(base.glob("model-*-of-*.safetensors"))
    if shards and not (base / INDEX).exists():
        return f" It has {len(shards)} shards, and no {INDEX} that says what is in them. Fetch that file too."
    return " Give a folder of safetensors."
