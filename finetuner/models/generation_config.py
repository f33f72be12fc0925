"""At which tokens generation has to stop: a model that was taught turns ends them with a token of its own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "answer"


def write_generation_config(folder: Path, token_ids: dict[str, int]) -> None:
    """Complete generation_config.json with the stops of the folder's own tokenizer.

    `token_ids`: special tokens by role that the recipe chose; a chosen end of text takes the place of the base's.
    """
    path = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if settings.get(role) is None and config.get(role) is not None:
            settings[role] = config[role]
    settings |= token_ids
    stops = _listed(settings.get("eos_token_id"))
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        stops += [one for one in stop_ids(AutoTokenizer.from_pretrained(folder)) if one not in stops]
    if stops:
        settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    settings.pop("_from_model_config", None)  # it would be made anew from config.json, without these stops
    path.write_text(json.dumps(settings, indent=2) + "\n")


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end of text, and the added token behind an answer in the chat template, if they are known."""
    end: Any = tokenizer.eos_token_id
    stops = [] if end is None else [end]
    turn = _end_of_turn(tokenizer)
    return stops + ([turn] if turn is not None and turn not in stops else [])


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError):  # a template that wants more than two plain turns
        return None
    behind: Any = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    # A recipe's `tokens` are added as words, not as special ones, and end its turns all the same.
    return behind[0] if behind and behind[0] in tokenizer.added_tokens_decoder else None


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
