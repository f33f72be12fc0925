"""Entries -> documents that fit, with every row accounted for."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuner.data.chat import build_chat_renderer
from finetuner.data.formats import (
    Rendered,
    render_alpaca,
    render_completion,
    render_instruction,
    render_prompt_completion,
    render_segments,
)
from finetuner.data.messages import MessageReader
from finetuner.data.order import held_out_rows
from finetuner.data.packing import Packs
from finetuner.data.sources import Row, Source, load_source
from finetuner.data.store import Collector, FileCollector, MemoryCollector
from finetuner.data.tokens import IGNORE, Ids, Rows, TokenStore, read_tokens, tokenize
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = tuple[Ids, Ids]
Report = Callable[[int, int], None]  # rows done, rows in all
Renderer = Callable[[Row], Rendered]

BATCH_ROWS = 512

TOO_LONG = "longer than sequence_len"
TOO_SHORT = "shorter than min_sample_len"
UNTRAINED = "without a trained token"
BAD = "that cannot become text"
BLANK = "of blank text"
CUT = "cut to sequence_len"
SPLIT = "split into several documents"

# What max_dropped_fraction speaks of: cut and split rows are learned, and blank lines of a text are none.
DROPPED = (TOO_LONG, TOO_SHORT, UNTRAINED, BAD)


class Outcome(NamedTuple):
    """A row that is not learned as it stands. `length`: its tokens, 0 if it has none."""

    source: str
    row: int
    reason: str
    length: int
    detail: str = ""


@dataclass(frozen=True)
class Prepared:
    """Training and held-out documents, and what became of the rows that are not among them."""

    train: TokenStore
    held_out: TokenStore
    counts: Counter[str]
    num_rows: int
    train_packs: Packs | None = None
    held_out_packs: Packs | None = None
    listed: Path | None = None  # the file that lists the rows of `counts`

    @property
    def train_rows(self) -> Rows:
        return self.train_packs or self.train

    @property
    def held_out_rows(self) -> Rows:
        return self.held_out_packs or self.held_out

    @property
    def notes(self) -> list[str]:
        return [f"{count:,} rows {reason}" for reason, count in sorted(self.counts.items())]


def prepare(
    section: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    report: Report = lambda done, total: None,
    *,
    into: Path | None = None,
) -> Prepared:
    """Render, tokenise and split all rows; into files of the folder `into`, or into memory.

    Raises DataError if a row cannot be rendered (unless on_bad_row says to skip it), or nothing is left to train on.
    """
    sources = [load_source(entry) for entry in section.datasets]
    test_sources = [load_source(entry) for entry in section.test_datasets]
    num_train_rows = sum(map(len, sources))
    held_out = held_out_rows(seed, num_train_rows, section.val_set_size)
    held_out = np.concatenate([held_out, np.ones(sum(map(len, test_sources)), dtype=bool)])
    stores: tuple[Collector, Collector] = (
        (MemoryCollector(), MemoryCollector())
        if into is None
        else (FileCollector(into, "train"), FileCollector(into, "held_out"))
    )
    outcomes: list[Outcome] = []
    number = 0
    for source in [*sources, *test_sources]:
        for documents in _documents(source, section, tokenizer, outcomes):
            for ids, labels in documents:
                stores[int(held_out[number])].add(ids, labels)
            number += 1
            if number % BATCH_ROWS == 0 or number == len(held_out):
                report(number, len(held_out))
    counts = Counter(outcome.reason for outcome in outcomes)
    if into is not None:
        with (into / "dropped.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(outcome._asdict()) + "\n" for outcome in outcomes)
    prepared = Prepared(stores[0].finish(), stores[1].finish(), counts, len(held_out))
    _require_documents(prepared, section, held_out[:num_train_rows])
    return prepared


def packed(prepared: Prepared, sequence_len: int, *, train: bool, held_out: bool) -> Prepared:
    """The same, with packs of the one, the other or both."""
    return replace(
        prepared,
        train_packs=Packs.of(prepared.train, sequence_len) if train else None,
        held_out_packs=Packs.of(prepared.held_out, sequence_len) if held_out and len(prepared.held_out) else None,
    )


def require_kept(prepared: Prepared, section: DataSection) -> None:
    """Raises DataError with the table of reasons if more rows are dropped than the recipe allows."""
    counts = {reason: prepared.counts[reason] for reason in DROPPED if prepared.counts[reason]}
    share = sum(counts.values()) / prepared.num_rows
    if share <= section.max_dropped_fraction:
        return
    table = "\n".join(f"  {count:>9,} rows {reason}" for reason, count in counts.items())
    listed = f"Each is listed in {prepared.listed}\n" if prepared.listed is not None else ""
    raise DataError(
        f"{share:.1%} of the {prepared.num_rows:,} rows would be dropped, and max_dropped_fraction allows "
        f"{section.max_dropped_fraction:.0%}:\n{table}\n{listed}"
        f"Raise sequence_len (it is {section.sequence_len}), write `excess_length_strategy: truncate` or `split`, or "
        f"allow it: `max_dropped_fraction: {min(1.0, np.ceil(share * 20) / 20):g}`."
    )


def _documents(
    source: Source, section: DataSection, tokenizer: "PreTrainedTokenizerBase", outcomes: list[Outcome]
) -> Iterator[list[Document]]:
    """What each row of a source becomes: no document, one, or several."""
    render = _renderer(source.entry, section, tokenizer) if source.entry.type is not None else None
    for first, rows in source.batches(BATCH_ROWS):
        texts: list[Rendered | Document | None] = []
        for i, row in enumerate(rows):
            try:
                texts.append(render(row) if render is not None else read_tokens(row, len(tokenizer)))
            except DataError as error:
                if section.on_bad_row == "raise":
                    raise DataError(f"{source.entry.path}: row {first + i}: {error}.") from None
                outcomes.append(Outcome(source.entry.path, first + i, BAD, 0, str(error)))
                texts.append(None)
        tokenized = iter(tokenize([text for text in texts if isinstance(text, Rendered)], tokenizer))
        for i, text in enumerate(texts):
            if text is None:
                yield []
                continue
            document = next(tokenized) if isinstance(text, Rendered) else text
            if isinstance(text, Rendered) and source.entry.type == "completion" and not text.text.strip():
                outcomes.append(Outcome(source.entry.path, first + i, BLANK, 0))
                yield []
                continue
            yield _fit(document, section, outcomes, source.entry.path, first + i)


def _renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """How the rows of an entry become text. Raises DataError if the tokenizer cannot do it."""
    render = _renderer_of_type(entry, section, tokenizer)
    if not section.train_on_inputs:
        return render

    def render_all(row: Row) -> Rendered:
        one = render(row)
        return Rendered(one.text, ((0, len(one.text)),), one.wraps, one.contents)

    return render_all


def _renderer_of_type(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    form = entry.type
    if isinstance(form, InstructionFormat):
        return lambda row: render_instruction(row, form)
    if form == "alpaca":
        return render_alpaca
    if form == "completion":
        return lambda row: render_completion(row, entry.field)
    if form == "input_output":
        return render_segments
    if form == "prompt_completion":
        return render_prompt_completion
    reader = MessageReader.of(entry)
    chat = build_chat_renderer(
        tokenizer,
        kwargs=section.chat_template_kwargs,
        eot_tokens=section.eot_tokens,
        train_on_eos=entry.train_on_eos,
        train_on_eot=entry.train_on_eot,
    )
    return lambda row: chat.render(reader.read(row))


def _fit(document: Document, section: DataSection, outcomes: list[Outcome], source: str, row: int) -> list[Document]:
    """The row's document as it is trained on: none, one, or, if it is split, several."""
    ids, labels = document
    limit, length = section.sequence_len, len(ids)

    def outcome(reason: str) -> None:
        outcomes.append(Outcome(source, row, reason, length))

    if length < section.min_sample_len:
        outcome(TOO_SHORT)
        return []
    pieces = [document]
    if length > limit:
        if section.excess_length_strategy == "raise":
            raise DataError(
                f"{source}: row {row}: {length} tokens, but sequence_len is {limit}.\n"
                "Raise sequence_len, or write `excess_length_strategy: drop`, `truncate` or `split`."
            )
        if section.excess_length_strategy == "drop":
            outcome(TOO_LONG)
            return []
        split = section.excess_length_strategy == "split"
        outcome(SPLIT if split else CUT)
        pieces = [(ids[at : at + limit], labels[at : at + limit]) for at in range(0, length if split else 1, limit)]
    trained = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORE).any()]
    if not trained:
        outcome(UNTRAINED)
    return [(ids, labels) for ids, labels in trained if len(ids) >= section.min_sample_len]


def _require_documents(prepared: Prepared, section: DataSection, held_out: NDArray[np.bool_]) -> None:
    dropped = "; ".join(prepared.notes)
    advice = f"Raise sequence_len (it is {section.sequence_len})"
    if not any(prepared.counts[reason] for reason in (TOO_LONG, CUT, SPLIT)):
        advice = "Rows need an answer: a message with role 'assistant', or an output"
    if len(prepared.train) == 0:
        if held_out.all():
            raise DataError(
                f"val_set_size: {section.val_set_size} holds out all {len(held_out)} rows. Make it smaller."
            )
        raise DataError(f"no row is left to train on, of {len(held_out)}: {dropped}.\n{advice}.")
    if (section.val_set_size or section.test_datasets) and len(prepared.held_out) == 0:
        raise DataError(f"no held-out row is left: {dropped}.\n{advice}, or val_set_size.")
