"""Load a model that writes text: a folder, a hub id, or what a recipe trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.console import Screen, quiet_libraries
from finetuner.data.tokenizer import load_tokenizer
from finetuner.errors import ModelError
from finetuner.evaluation.compared_models import ADAPTER_CONFIG
from finetuner.models.adapter_folder import read_config
from finetuner.models.attention import choose_attention
from finetuner.models.config_overrides import prepared_base
from finetuner.models.embeddings import grow_for_adapter
from finetuner.models.load import load_model
from finetuner.plan.precision import Precision
from finetuner.recipe import load
from finetuner.recipe.sections import TokenizerSection
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingOptions:
    """Tokens to write at most, the temperature, the share of the probability to draw from, and the seed."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class TextModel:
    """A model that writes, with its tokenizer. `template_values`: variables that its recipe gives the chat template."""

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    template_values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """Names to load from: the folder or hub id of a model or adapter, and the base of an adapter (None: it says)."""

    name: str
    base: str | None = None
    trust_remote_code: bool = False
    template_values: Mapping[str, Any] = field(default_factory=dict)


def load_text_model(source: str, overrides: list[str]) -> TextModel:
    """Load a recipe's trained model, or its base with its adapter; or a folder of either, or a model on the hub.

    Raises FinetunerError for overrides of what is no recipe, a recipe that was not trained, or no model."""
    if Path(source).suffix in (".yml", ".yaml"):
        found = _trained_by(source, overrides)
    elif overrides:
        raise ModelError(f"'{overrides[0]}' sets a key of a recipe, and '{source}' is a model. Remove it.")
    else:
        found = _Source(source)
    world = World.detect()
    quiet_libraries(Screen(enabled=False))
    tokenizer = load_tokenizer(TokenizerSection(), found.name, found.trust_remote_code).tokenizer
    folder, base = Path(found.name), found.base
    if base is None and (folder / ADAPTER_CONFIG).exists():
        base = _base_of(folder)
    precision: Precision = "bf16" if world.bf16 and world.device == "cuda" else "fp32"
    model: Any = load_model(
        base or found.name,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        attention=choose_attention("auto", world, precision),
        trust_remote_code=found.trust_remote_code,
    )
    if base is not None:
        from peft import PeftModel  # behind quiet_libraries: it imports bitsandbytes, which warns

        grow_for_adapter(model, folder, len(tokenizer))
        model = PeftModel.from_pretrained(model, found.name)
    return TextModel(model.to(world.device).eval(), tokenizer, found.template_values)


def _trained_by(recipe_name: str, overrides: list[str]) -> _Source:
    recipe = load(recipe_name, overrides, check_files=False).recipe  # the rows may be elsewhere by now
    folder = Path(recipe.output.output_dir)
    base = (
        prepared_base(recipe.model, recipe.data.dataset_prepared_path, World())
        if recipe.adapter.adapter is not None
        else None
    )
    if not (folder / (ADAPTER_CONFIG if base else "config.json")).exists():
        raise ModelError(
            f"nothing is trained in {folder} yet. Train it first:\n  accelerate launch -m finetuner.train {recipe_name}"
        )
    return _Source(str(folder), base, recipe.model.trust_remote_code, recipe.data.chat_template_kwargs)


def _base_of(adapter: Path) -> str:
    base = read_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"the adapter in '{adapter}' does not say what it was trained on. Give its recipe instead.")
    return str(base)
