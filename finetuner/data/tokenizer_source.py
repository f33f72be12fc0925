"""Which tokenizer a recipe has: one that it names, or one that is made for its text, once.

<dataset_prepared_path>/tokenizers/<key>/   a tokenizer made for the recipe's text
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from finetuner.data import new_tokenizers as vocabularies
from finetuner.data.cache import source_facts
from finetuner.data.new_tokenizers import train_bpe, write_byte_tokenizer, write_char_tokenizer
from finetuner.data.sources import load_source
from finetuner.errors import DataError, ModelError
from finetuner.recipe import Recipe
from finetuner.recipe.gpt_shape import MADE_TOKENIZERS
from finetuner.recipe.sections import DatasetEntry, NewTokenizer
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.world import World

if TYPE_CHECKING:
    pass

Report = Callable[[int, int], None]  # rows done, rows in all


_ROWS = 512


def tokenizer_name(recipe: Recipe, world: World, report: Report = lambda done, total: None) -> str | None:
    """The tokenizer that the recipe names, or the folder of the one that is made for it. Raises FinetunerError."""
    named = recipe.tokenizer.tokenizer
    if isinstance(named, str | None) and named not in MADE_TOKENIZERS:
        return named
    learned = named.train if isinstance(named, NewTokenizer) else None
    entries = () if named == "byte" else tokenizer_entries(recipe)
    facts = {
        "kind": learned.vocab_size if learned else named,
        "texts": [source_facts(entry, recipe.data) for entry in entries],
        "code": [Path(vocabularies.__file__).read_text(encoding="utf-8"), tokenizers.__version__],
    }

    def make(folder: Path) -> None:
        texts = texts_of(entries, recipe, report)
        if learned:
            train_bpe(texts, learned.vocab_size, folder)
        elif named == "char":
            write_char_tokenizer(texts, folder)
        else:
            write_byte_tokenizer(folder)

    folder = Path(recipe.data.dataset_prepared_path) / "tokenizers" / _key(facts)
    with explain_disk_errors(
        ModelError, f"cannot write to '{folder.parent}'", "Make room, or name another folder: dataset_prepared_path=..."
    ):
        return str(build_once(folder, make, is_builder=world.local_rank == 0))


def tokenizer_entries(recipe: Recipe) -> tuple[DatasetEntry, ...]:
    """The sources of text that a tokenizer is made from: `files`, or the datasets; characters of held-out rows too."""
    named = recipe.tokenizer.tokenizer
    files = named.train.files if isinstance(named, NewTokenizer) else ()
    if files:
        whole = (".txt", ".txt.gz")
        return tuple(
            DatasetEntry(path=name, type="completion", sample_by="document" if name.endswith(whole) else "line")
            for name in files
        )
    return (*recipe.data.datasets, *(recipe.data.test_datasets if named == "char" else ()))


def texts_of(
    entries: tuple[DatasetEntry, ...], recipe: Recipe, report: Report = lambda done, total: None
) -> Iterator[str]:
    """The text of every row. Raises DataError at a row without one, unless on_bad_row says to skip it."""
    sources = [load_source(entry, Path(recipe.data.dataset_prepared_path) / "fetched") for entry in entries]
    done, total = 0, sum(map(len, sources))
    for source in sources:
        for batch in source.batches(_ROWS):
            for placed in batch:
                text = None if isinstance(placed.row, DataError) else placed.row.get(source.entry.field)
                if isinstance(text, str):
                    yield text
                elif recipe.data.on_bad_row == "raise":
                    raise DataError(f"{placed.file}: row {placed.number}: it has no text in '{source.entry.field}'.")
            done += len(batch)
            report(done, total)


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
