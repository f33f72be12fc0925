"""What a model of examples/gpt_stdlib.yml writes: bits per byte, and the share of its texts that are Python.

    python benchmarks/scratch_quality.py outputs/gpt_stdlib [--samples 50] [--tokens 300] [--temperature 0.7]

Each sample begins with --prompt, by a seed of its own: the first token of a document is nothing that the model learned
to predict. One that ends by itself is judged whole;
one that is cut off after --tokens tokens is judged without its last top-level statement, which was not finished. What
is judged counts as Python if `ast.parse` accepts it and it has at least one statement; nothing left to judge counts
against the model. Bits per byte are those of the run's last evaluation, in its metrics.jsonl.
"""

import argparse
import ast
import statistics
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finetuner.commands.text_model import TextModel, load_text_model
from finetuner.models.generation import context_length, draw_token, generate_tokens, prompt_tokens, stream_text
from finetuner.models.stop_tokens import stop_token_ids
from finetuner.training.metrics import read_metrics

_GOES_ON = ("else", "elif", "except", "finally")


@dataclass(frozen=True)
class Sample:
    """`ended`: by the model's own end of text."""

    text: str
    ended: bool

    @property
    def judged(self) -> str:
        return self.text if self.ended else without_last_statement(self.text)

    @property
    def is_python(self) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in its strings
            try:
                return bool(ast.parse(self.judged).body)
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                return False


def without_last_statement(text: str) -> str:
    """The text before the last line that begins a statement at the margin, and before the decorators of it."""
    lines = text.splitlines(keepends=True)
    # A quote or a bracket at the margin ends a statement as often as it begins one: such a line is never cut at.
    begins = [
        i for i, line in enumerate(lines) if (line[0].isalpha() or line[0] in "_@") and not line.startswith(_GOES_ON)
    ]
    if not begins:
        return ""
    last = begins[-1]
    while last > 0 and lines[last - 1].startswith("@"):
        last -= 1
    return "".join(lines[:last])


def write(speaker: TextModel, prompt: str, seed: int, *, count: int, temperature: float, top_p: float) -> Sample:
    model, tokenizer = speaker.model, speaker.tokenizer
    ids = prompt_tokens(tokenizer, prompt)
    stops = stop_token_ids(tokenizer, model.generation_config)
    generator = torch.Generator().manual_seed(seed)
    choice = partial(draw_token, temperature=temperature, top_p=top_p, generator=generator)
    tokens = list(generate_tokens(model, ids, count=count, choice=choice, stops=stops, context=context_length(model)))
    return Sample(prompt + "".join(stream_text(tokenizer, ids, tokens)), ended=len(tokens) < count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--show", type=int, default=2, help="samples to print in full")
    arguments = parser.parse_args()
    speaker = load_text_model(str(arguments.run), [])
    manner = {"count": arguments.tokens, "temperature": arguments.temperature, "top_p": arguments.top_p}
    samples = [write(speaker, arguments.prompt, seed, **manner) for seed in range(arguments.samples)]
    for seed, sample in enumerate(samples[: arguments.show]):
        print(f"--- seed {seed}, {'Python' if sample.is_python else 'not Python'}\n{sample.text}\n---")
    measured = [row for row in read_metrics(arguments.run / "metrics.jsonl") if "eval_bits_per_byte" in row]
    if measured:
        last = measured[-1]
        print(f"held-out loss {last['eval_loss']:.4f}, bits per byte {last['eval_bits_per_byte']:.4f}")
    good, ended = sum(sample.is_python for sample in samples), sum(sample.ended for sample in samples)
    length = statistics.mean(len(sample.judged) for sample in samples)
    print(
        f"{good} of {len(samples)} samples are Python ({good / len(samples):.0%}); {ended} ended by themselves; "
        f"{length:,.0f} characters were judged in the mean (temperature {arguments.temperature:g}, top-p "
        f"{arguments.top_p:g}, {arguments.tokens} tokens at most)"
    )


if __name__ == "__main__":
    main()
