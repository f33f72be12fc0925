"""`finetuner tokenizer`: make the tokenizer of a recipe and measure it on its text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.console import Screen, quiet_libraries
from finetuner.data.tokenizer import load_tokenizer
from finetuner.data.tokenizer_source import read_texts, resolve_tokenizer
from finetuner.recipe import load
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_BYTES = 2_000_000  # of text to measure a tokenizer with


def tokenizer(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Make the tokenizer, and print its size and how much text a token stands for. Raises FinetunerError."""
    loaded, screen = load(recipe, overrides or []), Screen(enabled=True)
    values = loaded.recipe
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    with screen.work("making the tokenizer", "rows") as work:
        name = resolve_tokenizer(values.tokenizer, values.data, World(), work.at) or values.model.base_model
    made = load_tokenizer(values.tokenizer, name, values.model.trust_remote_code).tokenizer
    rows = [("tokenizer", name), ("vocabulary", f"{len(made):,} tokens")]
    plain = tuple(entry for entry in values.data.datasets if entry.is_plain_text)
    found = measure_tokenizer(made, read_texts(plain, values.data))
    if found is not None:
        rows += [
            ("bytes per token", f"{found.num_bytes / found.num_tokens:.3f}"),
            ("tokens per word", f"{found.num_tokens / max(1, found.num_words):.3f}"),
            (
                "measured on",
                f"{found.num_bytes:,} bytes of the datasets: {found.num_tokens:,} tokens, {found.num_words:,} words",
            ),
        ]
    screen.table(rows)


@dataclass(frozen=True)
class TextSize:
    """Size of one text in bytes of UTF-8, tokens, and words between blanks."""

    num_bytes: int
    num_tokens: int
    num_words: int


def measure_tokenizer(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> TextSize | None:
    """Tokenize about the first 2 MB of the texts, and return their sizes; None if there is no text."""
    sample: list[str] = []
    num_bytes = 0
    for text in texts:
        sample.append(text[:_SAMPLE_BYTES])
        num_bytes += len(sample[-1].encode())
        if num_bytes >= _SAMPLE_BYTES:
            break
    if not sample:
        return None
    num_tokens = sum(len(tokens.ids) for tokens in tokenizer.backend_tokenizer.encode_batch(sample))
    return TextSize(num_bytes, num_tokens, sum(len(text.split()) for text in sample))
