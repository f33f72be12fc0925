"""`finetuner generate`: text from a model folder, a hub id, or what a recipe trained."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer

from finetuner.commands.arguments import MaxNewTokens, ModelOrRecipe, Overrides, Seed, Temperature, TopP
from finetuner.commands.text_model import SamplingOptions, load_text_model
from finetuner.models.context_length import context_length
from finetuner.models.generation import draw_token, generate_tokens, prompt_tokens, stream_text
from finetuner.models.stop_tokens import stop_token_ids


def generate(
    source: ModelOrRecipe,
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Print the prompt and what follows it, as it comes. Raises FinetunerError."""
    options = SamplingOptions(max_new_tokens, temperature, top_p, seed)
    generate_text(source, overrides or [], prompt, options, write_at_once)


def generate_text(
    source: str, overrides: list[str], prompt: str, options: SamplingOptions, write: Callable[[str], None]
) -> None:
    """Hand the prompt and what follows it to `write`, piece by piece. Raises FinetunerError."""
    speaker = load_text_model(source, overrides)
    tokenizer, model = speaker.tokenizer, speaker.model
    ids = prompt_tokens(tokenizer, prompt)
    generator = torch.Generator().manual_seed(options.seed)
    choice = partial(draw_token, temperature=options.temperature, top_p=options.top_p, generator=generator)
    stops, context = stop_token_ids(tokenizer, model.generation_config), context_length(model)
    tokens = generate_tokens(model, ids, count=options.max_new_tokens, choice=choice, stops=stops, context=context)
    write(prompt)
    for text in stream_text(tokenizer, ids, tokens):
        write(text)
    write("\n")


def write_at_once(text: str) -> None:
    """Write to the standard output without waiting for the end of the line."""
    sys.stdout.write(text)
    sys.stdout.flush()
