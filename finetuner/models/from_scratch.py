"""A run from scratch begins with a model folder like any other: its tokenizer, and random weights, made once.

    <dataset_prepared_path>/tokenizers/<key>/   a tokenizer made for the recipe's text
    <dataset_prepared_path>/scratch/<key>/      config.json and model.safetensors, drawn by the recipe's seed

From there on every engine reads, spreads and resumes it as it does a model that was trained before.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers

from finetuner.data.cache import source_facts
from finetuner.data.sources import load_source
from finetuner.errors import DataError, ModelError
from finetuner.models import gpt
from finetuner.models import new_tokenizers as vocabularies
from finetuner.models.new_tokenizers import train_bpe, write_byte_tokenizer, write_char_tokenizer
from finetuner.recipe import Recipe
from finetuner.recipe.gpt_shape import MADE_TOKENIZERS, shape_of
from finetuner.recipe.sections import DatasetEntry, GPTSection, NewTokenizer
from finetuner.storage.build_once import made_once
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    return str(made_once(Path(recipe.data.dataset_prepared_path) / "tokenizers" / _key(facts), make, world))


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


def scratch_config(section: GPTSection | None, tokenizer: "PreTrainedTokenizerBase") -> gpt.GPTConfig:
    """The shape with the vocabulary. Raises ModelError if the tokenizer has more tokens than `vocabulary`."""
    assert section is not None, "a rule asks for the block"
    shape = shape_of(section)
    if shape.vocabulary is not None and shape.vocabulary < len(tokenizer):
        raise ModelError(
            f"model.vocabulary is {shape.vocabulary}, but the tokenizer has {len(tokenizer)} tokens.\n"
            f"Write `vocabulary: {-(-len(tokenizer) // 64) * 64}`, or leave it out."
        )
    return gpt.GPTConfig(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.context,
        norm=shape.norm,
        activation=shape.activation,
        positions=shape.positions,
        bias=shape.bias,
        dropout=shape.dropout,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def begun_model(config: gpt.GPTConfig, root: str, seed: int, world: World) -> str:
    """The folder of a model of that shape with weights drawn by `seed`, the same on every machine and rank."""
    facts = {
        "config": config.to_dict(),
        "seed": seed,
        "code": [Path(gpt.__file__).read_text(encoding="utf-8"), torch.__version__, transformers.__version__],
    }

    def make(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gpt.GPTForCausalLM(config).save_pretrained(folder)

    return str(made_once(Path(root) / "scratch" / _key(facts), make, world))


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
