"""adapter_config.json in an adapter's folder: its settings, and the base that it was trained on."""

import json
from pathlib import Path
from typing import Any

from finetuner.errors import ModelError


def read_config(adapter: Path) -> dict[str, Any]:
    """Return the settings of an adapter under PEFT's names. Raises ModelError for a folder that holds none."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"'{adapter}' is not the folder of an adapter: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{adapter}/adapter_config.json' holds no settings of an adapter.")
    return config


def require_same_base(adapter: Path, base_model: str) -> None:
    """Raise ModelError if the adapter says that it was trained on another base."""
    trained_on = read_config(adapter).get("base_model_name_or_path")
    if trained_on and trained_on != base_model and Path(trained_on).resolve() != Path(base_model).resolve():
        raise ModelError(
            f"the adapter in '{adapter}' was trained on '{trained_on}', and the recipe names '{base_model}'.\n"
            f"Merged onto another base it is worthless. If it is the same model: base_model={trained_on}"
        )
