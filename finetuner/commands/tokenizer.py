"""`finetuner tokenizer`: make the tokenizer of a recipe and measure it on its text."""

from typing import TYPE_CHECKING

from finetuner.console import Screen, quiet_libraries
from finetuner.data.tokenizer import load_tokenizer
from finetuner.data.tokenizer_source import read_texts, resolve_tokenizer
from finetuner.recipe import Loaded
from finetuner.world import World

if TYPE_CHECKING:
    pass


_SAMPLE_BYTES = 2_000_000  # of text to measure a tokenizer with


def make_tokenizer(loaded: Loaded) -> None:
    """Make the tokenizer that the recipe asks for, and measure it on the recipe's text. Raises FinetunerError."""
    recipe, screen = loaded.recipe, Screen(speaks=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    with screen.work("making the tokenizer", "rows") as work:
        name = resolve_tokenizer(recipe.tokenizer, recipe.data, World(), work.at) or recipe.model.base_model
    tokenizer = load_tokenizer(recipe.tokenizer, name, recipe.model.trust_remote_code).tokenizer
    rows = [("tokenizer", name), ("vocabulary", f"{len(tokenizer):,} tokens")]
    texts, num_bytes = [], 0
    plain = tuple(entry for entry in recipe.data.datasets if entry.type == "completion")
    for text in read_texts(plain, recipe.data):
        texts.append(text[:_SAMPLE_BYTES])
        num_bytes += len(texts[-1].encode())
        if num_bytes >= _SAMPLE_BYTES:
            break
    if texts:
        num_tokens = sum(len(tokens.ids) for tokens in tokenizer.backend_tokenizer.encode_batch(texts))
        num_words = sum(len(text.split()) for text in texts)
        rows.append(("bytes per token", f"{num_bytes / num_tokens:.3f}"))
        rows.append(("tokens per word", f"{num_tokens / max(1, num_words):.3f}"))
        rows.append(("measured on", f"{num_bytes:,} bytes of the datasets: {num_tokens:,} tokens, {num_words:,} words"))
    screen.table(rows)
