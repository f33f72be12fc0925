"""`finetuner chat`: a conversation with a model, from the terminal or a pipe."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from finetuner.commands.arguments import MaxNewTokens, ModelOrRecipe, Overrides, Seed, Temperature, TopP
from finetuner.commands.conversation import hold_conversation
from finetuner.commands.generate import write_at_once
from finetuner.commands.text_model import SamplingOptions
from finetuner.world import stream_is_terminal


def chat(
    source: ModelOrRecipe,
    overrides: Overrides = None,
    system: Annotated[str, typer.Option(help="An instruction at the head of the conversation.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
) -> None:
    """Answer each line of the input: answers go to the standard output, remarks to stderr. Raises FinetunerError."""
    hold_conversation(
        source,
        overrides or [],
        system,
        SamplingOptions(max_new_tokens, temperature, top_p, seed),
        _lines_of_input,
        write_at_once,
        lambda text: typer.echo(text, err=True),
    )


def _lines_of_input() -> Iterator[str]:
    """Yield lines of a person, who sees a prompt and may edit the line; or of a file or pipe."""
    if not stream_is_terminal(sys.stdin):
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # lends its editing to input()
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        yield line
