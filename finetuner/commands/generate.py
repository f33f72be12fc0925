"""`finetuner generate`: text from a model folder, a hub id, or what a recipe trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.console import Screen, quiet_libraries
from finetuner.data.tokenizer import load_tokenizer
from finetuner.errors import ModelError
from finetuner.models.attention import choose_attention
from finetuner.models.context_length import context_length
from finetuner.models.embeddings import grow_embeddings
from finetuner.models.generation import draw_token, generate_tokens, prompt_tokens, stream_text
from finetuner.models.load import load_model
from finetuner.models.pickled_weights import safetensors_base
from finetuner.models.stop_tokens import stop_token_ids
from finetuner.plan.precision import Precision
from finetuner.recipe import load
from finetuner.recipe.sections import TokenizerSection
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Manner:
    """How to draw: `count` tokens at most, with this temperature and share of the probability, from this seed."""

    count: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Speaker:
    """A model that writes. `template_values`: variables that its recipe gives the chat template."""

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    template_values: Mapping[str, Any] = field(default_factory=dict)


def generate(source: str, overrides: list[str], prompt: str, manner: Manner, write: Callable[[str], None]) -> None:
    """Write the prompt and what follows it, as it comes. Raises FinetunerError."""
    speaker = speaker_of(source, overrides)
    tokenizer, model = speaker.tokenizer, speaker.model
    ids = prompt_tokens(tokenizer, prompt)
    generator = torch.Generator().manual_seed(manner.seed)
    choice = partial(draw_token, temperature=manner.temperature, top_p=manner.top_p, generator=generator)
    stops, context = stop_token_ids(tokenizer, model.generation_config), context_length(model)
    tokens = generate_tokens(model, ids, count=manner.count, choice=choice, stops=stops, context=context)
    write(prompt)
    for text in stream_text(tokenizer, ids, tokens):
        write(text)
    write("\n")


def speaker_of(source: str, overrides: list[str]) -> Speaker:
    """A recipe's trained model, or its base with its adapter; or a folder of either, or a model on the hub."""
    path, base, trust = Path(source), None, False
    values: Mapping[str, Any] = {}
    if path.suffix in (".yml", ".yaml"):
        recipe = load(source, overrides, check_files=False).recipe  # the rows may be elsewhere by now
        path, trust = Path(recipe.output.output_dir), recipe.model.trust_remote_code
        values = recipe.data.chat_template_kwargs
        base = (
            safetensors_base(recipe.model, recipe.data.dataset_prepared_path, World())
            if recipe.adapter.adapter is not None
            else None
        )
        if not (path / (ADAPTER if base else "config.json")).exists():
            raise ModelError(
                f"nothing is trained in {path} yet. Train it first:\n  accelerate launch -m finetuner.train {source}"
            )
        source = str(path)
    elif overrides:
        raise ModelError(f"'{overrides[0]}' sets a key of a recipe, and '{source}' is a model. Remove it.")
    world = World.detect()
    quiet_libraries(Screen(speaks=False))
    tokenizer = load_tokenizer(TokenizerSection(), source, trust).tokenizer
    if base is None and (path / ADAPTER).exists():
        base = _base_of(path)
    precision: Precision = "bf16" if world.bf16 and world.device == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    attention = choose_attention("auto", world, precision)
    model: Any = load_model(base or source, dtype=dtype, attention=attention, trust_remote_code=trust)
    if base is not None:
        from peft import PeftModel

        grow_embeddings(model, len(tokenizer))
        model = PeftModel.from_pretrained(model, source)
    return Speaker(model.to(world.device).eval(), tokenizer, values)


def _base_of(adapter: Path) -> str:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise ModelError(f"the adapter in '{adapter}' does not say what it was trained on. Give its recipe instead.")
    return str(base)
