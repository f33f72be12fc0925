"""Where the files of a model are."""

import json
from pathlib import Path

from finetuner.errors import ModelError

INDEX = "model.safetensors.index.json"


def find_base(base_model: str) -> Path:
    """The folder of a base model, fetched from the hub if it is not one on this disk."""
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(base_model, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.json"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the base model '{base_model}' is neither a folder nor reachable on the hub: {first}"
        ) from error


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    if (base / INDEX).exists():
        names = sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [base / name for name in names]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        pickled = (
            " It has pickled weights (.bin), which can run code and are not read." if list(base.glob("*.bin")) else ""
        )
        raise ModelError(f"the base model folder '{base}' has no {missing[0]}.{pickled} Give a folder of safetensors.")
    return files
