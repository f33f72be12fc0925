"""Entries -> documents that fit, with every row accounted for."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetuner.data.formats import (
    Messages,
    Rendered,
    Span,
    render_alpaca,
    render_marked_messages,
    render_messages,
)
from finetuner.data.order import held_out_rows
from finetuner.data.sources import Row, Source, load_source
from finetuner.data.tokens import IGNORE, Ids, TokenStore, tokenize
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = tuple[Ids, Ids]
Report = Callable[[int, int], None]  # rows done, rows in all

BATCH_ROWS = 512

TOO_LONG = "longer than sequence_len"
CUT = "cut to sequence_len"
UNTRAINED = "without a trained token"


@dataclass(frozen=True)
class Prepared:
    """Training and held-out documents, and what became of the rows that are not among them."""

    train: TokenStore
    held_out: TokenStore
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> list[str]:
        return [f"{count:,} rows {reason}" for reason, count in sorted(self.counts.items())]


def prepare(
    section: DataSection, tokenizer: "PreTrainedTokenizerBase", seed: int, report: Report = lambda done, total: None
) -> Prepared:
    """Render, tokenise and split all rows.

    Raises DataError if a row cannot be rendered or nothing is left to train on.
    """
    sources = [load_source(entry) for entry in section.datasets]
    test_sources = [load_source(entry) for entry in section.test_datasets]
    total = sum(len(source) for source in [*sources, *test_sources])
    counts: Counter[str] = Counter()
    done = 0

    def documents(source: Source) -> Iterator[Document | None]:
        nonlocal done
        for first, rows in source.batches(BATCH_ROWS):
            texts = [_render(row, source, first + i, tokenizer, section.train_on_inputs) for i, row in enumerate(rows)]
            for i, document in enumerate(tokenize(texts, tokenizer)):
                yield _fit(document, section, counts, f"{source.entry.path}: row {first + i}")
            done += len(rows)
            report(done, total)

    rows = [document for source in sources for document in documents(source)]
    held_out = held_out_rows(seed, len(rows), section.val_set_size)
    train = TokenStore.of(d for d, out in zip(rows, held_out, strict=True) if d is not None and not out)
    if section.test_datasets:
        tests = TokenStore.of(d for source in test_sources for d in documents(source) if d is not None)
    else:
        tests = TokenStore.of(d for d, out in zip(rows, held_out, strict=True) if d is not None and out)
    prepared = Prepared(train, tests, counts)
    _require_documents(prepared, section, len(rows), held_out)
    return prepared


def _render(
    row: Row, source: Source, number: int, tokenizer: "PreTrainedTokenizerBase", train_on_inputs: bool
) -> Rendered:
    try:
        if source.entry.type == "alpaca":
            rendered = render_alpaca(row)
        else:
            rendered = _render_chat(row, source.entry.field_messages, tokenizer)
    except DataError as error:
        raise DataError(f"{source.entry.path}: row {number}: {error}.") from None
    return Rendered(rendered.text, ((0, len(rendered.text)),), rendered.wraps) if train_on_inputs else rendered


def _render_chat(row: Row, column: str, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    from transformers.utils.chat_template_utils import render_jinja_template

    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which `type: chat_template` needs. Take "
            "the instruct model's tokenizer (`tokenizer: NAME`), or `type: alpaca`"
        )
    template = tokenizer.get_chat_template()

    def render(messages: Messages) -> str:
        with _the_templates_word():
            return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def render_prompt(messages: Messages) -> str:
        with _the_templates_word():
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def render_marked(messages: Messages) -> tuple[str, list[Span]]:
        known: Any = tokenizer.special_tokens_map
        with _the_templates_word():
            result: Any = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, **known
            )
        texts, spans = result
        return texts[0], spans[0]

    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return render_marked_messages(row, column, render_marked)
    special = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return render_messages(row, column, render, render_prompt, special)


@contextmanager
def _the_templates_word() -> Iterator[None]:
    """A template is a program that came with the tokenizer; what it raises says which conversation it does not take."""
    try:
        yield
    except Exception as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def _fit(document: Document, section: DataSection, counts: Counter[str], where: str) -> Document | None:
    """The document as it is trained on, or None if it is not."""
    ids, labels = document
    if len(ids) > section.sequence_len:
        if section.excess_length_strategy == "raise":
            raise DataError(
                f"{where}: {len(ids)} tokens, but sequence_len is {section.sequence_len}.\n"
                "Raise sequence_len, or write `excess_length_strategy: drop` or `truncate`."
            )
        if section.excess_length_strategy == "drop":
            counts[TOO_LONG] += 1
            return None
        counts[CUT] += 1
        ids, labels = ids[: section.sequence_len], labels[: section.sequence_len]
    if not (labels[1:] != IGNORE).any():
        counts[UNTRAINED] += 1
        return None
    return ids, labels


def _require_documents(prepared: Prepared, section: DataSection, num_rows: int, held_out: NDArray[np.bool_]) -> None:
    dropped = "; ".join(prepared.notes)
    advice = f"Raise sequence_len (it is {section.sequence_len})"
    if not prepared.counts[TOO_LONG] and not prepared.counts[CUT]:
        advice = "Rows need an answer: a message with role 'assistant', or an output"
    if len(prepared.train) == 0:
        if held_out.all():
            raise DataError(f"val_set_size: {section.val_set_size} holds out all {num_rows} rows. Make it smaller.")
        raise DataError(f"no row is left to train on, of {num_rows}: {dropped}.\n{advice}.")
    if (section.val_set_size or section.test_datasets) and len(prepared.held_out) == 0:
        raise DataError(f"no held-out row is left: {dropped}.\n{advice}, or val_set_size.")
