"""generation_config.json of a trained model's folder: a model that was trained on turns stops at their end."""

import json
from pathlib import Path
from typing import Any

from finetuner.models.stop_tokens import as_id_list, stop_token_ids


def write_generation_config(folder: Path, token_ids: dict[str, int]) -> None:
    """Complete generation_config.json with the stop tokens of the folder's own tokenizer.

    `token_ids`: special tokens by role that the recipe chose; a chosen end of text takes the place of the base's.
    """
    path = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if settings.get(role) is None and config.get(role) is not None:
            settings[role] = config[role]
    settings |= token_ids
    stops = as_id_list(settings.get("eos_token_id"))
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        stops += [one for one in stop_token_ids(AutoTokenizer.from_pretrained(folder)) if one not in stops]
    if stops:
        settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    settings.pop("_from_model_config", None)  # transformers would derive it from config.json again, without these stops
    path.write_text(json.dumps(settings, indent=2) + "\n")
