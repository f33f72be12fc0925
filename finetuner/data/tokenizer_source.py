"""Resolve which tokenizer a recipe uses: one that it names, or one that is built from its texts, once.

<dataset_prepared_path>/tokenizers/<key>/   a tokenizer that was built
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from finetuner.data import new_tokenizers
from finetuner.data.cache import source_facts
from finetuner.data.new_tokenizers import train_bpe, write_byte_tokenizer, write_char_tokenizer
from finetuner.data.sources import load_source
from finetuner.errors import DataError, ModelError
from finetuner.recipe.gpt_shape import MADE_TOKENIZERS
from finetuner.recipe.rules import data_suffix
from finetuner.recipe.sections import DataSection, DatasetEntry, NewTokenizer, TokenizerSection
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.storage.progress import ProgressReport, no_progress
from finetuner.world import World

_ROWS_AT_ONCE = 512
_WHOLE_FILE = ".txt"  # read as one document; other files of `train.files` line by line


def resolve_tokenizer(
    section: TokenizerSection, data: DataSection, world: World, report: ProgressReport = no_progress
) -> str | None:
    """Return the tokenizer that the recipe names, or the folder of the one that is built for it.

    None if the recipe names none, which means the base model's. Raises FinetunerError.
    """
    named = section.tokenizer
    if isinstance(named, str | None) and named not in MADE_TOKENIZERS:
        return named
    training = named.train if isinstance(named, NewTokenizer) else None
    entries = () if named == "byte" else text_entries(section, data)
    facts = {
        "kind": training.vocab_size if training else named,
        "texts": [source_facts(entry, data) for entry in entries],
        "code": [Path(new_tokenizers.__file__).read_text(encoding="utf-8"), tokenizers.__version__],
    }

    def build(folder: Path) -> None:
        texts = read_texts(entries, data, report)
        if training:
            train_bpe(texts, training.vocab_size, folder)
        elif named == "char":
            write_char_tokenizer(texts, folder)
        else:
            write_byte_tokenizer(folder)

    folder = Path(data.dataset_prepared_path) / "tokenizers" / _key(facts)
    with explain_disk_errors(
        ModelError, f"cannot write to '{folder.parent}'", "Make room, or name another folder: dataset_prepared_path=..."
    ):
        return str(build_once(folder, build, is_builder=world.local_rank == 0))


def text_entries(section: TokenizerSection, data: DataSection) -> tuple[DatasetEntry, ...]:
    """Return the sources of text that a tokenizer is built from: its `files`, or the datasets.

    For a tokenizer of characters the test datasets too: a character that only they have would be unknown.
    """
    named = section.tokenizer
    files = named.train.files if isinstance(named, NewTokenizer) else ()
    if files:
        return tuple(
            DatasetEntry(
                path=name, type="completion", sample_by="document" if data_suffix(name) == _WHOLE_FILE else "line"
            )
            for name in files
        )
    return (*data.datasets, *(data.test_datasets if named == "char" else ()))


def read_texts(
    entries: tuple[DatasetEntry, ...], data: DataSection, report: ProgressReport = no_progress
) -> Iterator[str]:
    """Yield the text of every row. Raises DataError at a row without one, unless on_bad_row says to skip it."""
    sources = [load_source(entry, Path(data.dataset_prepared_path) / "fetched") for entry in entries]
    done, total = 0, sum(map(len, sources))
    for source in sources:
        for batch in source.batches(_ROWS_AT_ONCE):
            for row, file, number in batch:
                text = None if isinstance(row, DataError) else row.get(source.entry.field)
                if isinstance(text, str):
                    yield text
                elif data.on_bad_row == "raise":
                    raise DataError(f"{file}: row {number}: it has no text in '{source.entry.field}'.")
            done += len(batch)
            report(done, total)


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
