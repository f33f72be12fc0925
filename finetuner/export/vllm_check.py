"""Check that vLLM can serve a model folder, without vLLM: config, weights and tokenizer fit each other."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.errors import ModelError
from finetuner.models.files import weight_files
from finetuner.storage.safetensors_stream import read_header


@dataclass(frozen=True)
class ServingCheck:
    """Sentences on what was found good, and the command that serves the folder."""

    facts: tuple[str, ...]
    command: str


def check_for_vllm(folder: Path) -> ServingCheck:
    """Check the folder of a full or merged model. Raises ModelError with all that is missing."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"'{folder}' holds an adapter. Merge it first: python -m finetuner.merge {folder}")
    config = _read_config(folder)
    text_config = config.get("text_config", config)
    infos = [info for path in weight_files(folder) for info in read_header(path).values()]
    number_formats = sorted({info.dtype for info in infos})
    num_bytes = sum(info.num_bytes for info in infos)
    facts = [f"weights: {len(infos)} tensors, {num_bytes / 1e9:.2f} GB, {number_formats}"]
    wrong = [] if config.get("architectures") else ["config.json names no architectures"]
    if not (folder / "tokenizer_config.json").exists():
        wrong.append("there is no tokenizer")
    else:
        fact, mistake = _check_tokenizer(folder, text_config)
        facts.append(fact)
        wrong += [mistake] if mistake else []
    if wrong:
        raise ModelError(f"vLLM cannot serve '{folder}':\n" + "\n".join(f"  {one}" for one in wrong))
    length = text_config.get("max_position_embeddings")
    words = ["vllm serve", str(folder), *([f"--max-model-len {length}"] if length else [])]
    # vLLM computes fp32 weights in half precision unless told otherwise
    words += ["--dtype float32"] if number_formats == ["F32"] else []
    return ServingCheck(tuple(facts), " ".join(words))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"'{folder}' is not a model folder: {error}") from error
    return config


def _check_tokenizer(folder: Path, text_config: dict[str, Any]) -> tuple[str, str | None]:
    """Return a sentence on the tokenizer, and what is wrong with it, if anything."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    mistake = None
    if len(tokenizer) > text_config["vocab_size"]:
        mistake = f"the tokenizer has {len(tokenizer)} tokens, and the model rows for {text_config['vocab_size']}"
    template = "has a chat template" if tokenizer.chat_template else "has no chat template: completions only"
    return f"tokenizer: {len(tokenizer):,} tokens, {template}", mistake
