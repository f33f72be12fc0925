"""`finetuner generate`: text from a model folder, a hub id, or what a recipe trained."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer

from finetuner.commands.arguments import MaxNewTokens, ModelOrRecipe, Overrides, Seed, Temperature, TopP
from finetuner.commands.text_model import SamplingOptions, load_text_model
from finetuner.models.generation import as_text, choose, context_of, ends_of, first_tokens, sampled


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
    ids = first_tokens(tokenizer, prompt)
    generator = torch.Generator().manual_seed(options.seed)
    choice = partial(choose, temperature=options.temperature, top_p=options.top_p, generator=generator)
    ends, context = ends_of(model, tokenizer), context_of(model)
    tokens = sampled(model, ids, count=options.max_new_tokens, choice=choice, ends=ends, context=context)
    write(prompt)
    for text in as_text(tokenizer, ids, tokens):
        write(text)
    write("\n")


def write_at_once(text: str) -> None:
    """Write to the standard output without waiting for the end of the line."""
    sys.stdout.write(text)
    sys.stdout.flush()
