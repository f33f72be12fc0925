"""Rows of an entry -> documents that fit, and what became of the rows that are not among them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from finetuner.data.chat_renderer import build_chat_renderer
from finetuner.data.encoding import Encoder
from finetuner.data.formats import (
    Rendered,
    render_alpaca,
    render_completion,
    render_instruction,
    render_prompt_completion,
    render_segments,
)
from finetuner.data.messages import MessageReader
from finetuner.data.pretokenized import read_tokens
from finetuner.data.row_files import Row
from finetuner.data.sources import SourceRow
from finetuner.data.token_store import IGNORE_INDEX, Document
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Renderer = Callable[[Row], Rendered]

TOO_LONG = "longer than sequence_len"
TOO_SHORT = "shorter than min_sample_len"
UNTRAINED = "without a trained token"
BAD = "that cannot become text"
BLANK = "of blank text"
CUT = "cut to sequence_len"
SPLIT = "split into several documents"
SPLIT_IN_PART = "split, with parts left out that have nothing to learn or are too short"
DUPLICATE = "equal to an earlier row"

# What max_dropped_fraction speaks of: cut and split rows are learned, blank lines of a text are none, and equal rows
# are left out because the recipe says so.
DROPPED = (TOO_LONG, TOO_SHORT, UNTRAINED, BAD)


class Outcome(NamedTuple):
    """A row that is not learned as it stands. `length`: its tokens, 0 if it has none."""

    source: str
    row: int
    reason: str
    length: int
    detail: str = ""


class Made(NamedTuple):
    """What each row became: no document, one, or, if it was split, several."""

    documents: list[list[Document]]
    outcomes: list[Outcome]


class Texts(NamedTuple):
    """Rows, and what each is before it is tokenised: a text, a document where the row holds tokens, or None for a row
    that is left out, which is among the outcomes."""

    rows: Sequence[SourceRow]
    texts: list[Rendered | Document | None]
    outcomes: list[Outcome]

    def with_more(self, other: "Texts") -> "Texts":
        return Texts([*self.rows, *other.rows], self.texts + other.texts, self.outcomes + other.outcomes)

    @property
    def num_characters(self) -> int:
        return sum(len(text.text) for text in self.texts if isinstance(text, Rendered))


class DocumentMaker:
    """Turns rows of one entry into documents, in three steps of which the second, the costly one, is no Python's, so
    that it can go on beside the others."""

    def __init__(self, entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises DataError if the tokenizer cannot render this entry's rows."""
        self.entry, self.section, self.vocab_size = entry, section, len(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.renderer = _renderer(entry, section, tokenizer) if entry.type is not None else None
        # Far more characters than so many tokens can stand for: not worth the minutes that tokenising them takes.
        self.hopeless = section.sequence_len * max(map(len, tokenizer.get_vocab())) * 8

    def make(self, rows: Sequence[SourceRow]) -> Made:
        """Raises DataError at a row that cannot become tokens, unless on_bad_row says to skip it."""
        texts = self.render(rows)
        return self.fit(texts, self.tokenize(texts))

    def render(self, rows: Sequence[SourceRow]) -> Texts:
        outcomes: list[Outcome] = []
        return Texts(rows, [self._text(placed, outcomes) for placed in rows], outcomes)

    def tokenize(self, texts: Texts) -> list[Document]:
        return self.encoder.tokenize([text for text in texts.texts if isinstance(text, Rendered)])

    def fit(self, texts: Texts, tokenized: Sequence[Document]) -> Made:
        documents: list[list[Document]] = []
        outcomes, of_texts = list(texts.outcomes), iter(tokenized)
        for placed, text in zip(texts.rows, texts.texts, strict=True):
            if text is None:
                documents.append([])
                continue
            document = next(of_texts) if isinstance(text, Rendered) else text
            if isinstance(text, Rendered) and self.entry.type == "completion" and not text.text.strip():
                outcomes.append(Outcome(placed.file, placed.number, BLANK, 0))
                documents.append([])
                continue
            documents.append(fit(document, self.section, outcomes, placed))
        return Made(documents, outcomes)

    def _text(self, placed: SourceRow, outcomes: list[Outcome]) -> Rendered | Document | None:
        """None for a row that is skipped."""
        try:
            if isinstance(placed.row, DataError):
                raise placed.row
            if self.renderer is not None:
                text = self.renderer(placed.row)
                if len(text.text) > self.hopeless and self.section.excess_length_strategy == "drop":
                    outcomes.append(Outcome(placed.file, placed.number, TOO_LONG, 0, f"{len(text.text):,} characters"))
                    return None
                return text
            return read_tokens(placed.row, self.vocab_size)
        except DataError as error:
            if self.section.on_bad_row == "raise":
                raise DataError(
                    f"{placed.file}: row {placed.number}: {error}.\n"
                    "`on_bad_row: skip` leaves such rows out and lists them."
                ) from None
            outcomes.append(Outcome(placed.file, placed.number, BAD, 0, str(error)))
            return None


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


def fit(document: Document, section: DataSection, outcomes: list[Outcome], placed: SourceRow) -> list[Document]:
    """The row's document as it is trained on: none, one, or, if it is split, several."""
    ids, labels = document
    limit, length = section.sequence_len, len(ids)

    def outcome(reason: str) -> None:
        outcomes.append(Outcome(placed.file, placed.number, reason, length))

    if length < section.min_sample_len:
        outcome(TOO_SHORT)
        return []
    pieces = [document]
    if length > limit:
        if section.excess_length_strategy == "raise":
            raise DataError(
                f"{placed.file}: row {placed.number}: {length} tokens, but sequence_len is {limit}.\n"
                "Raise sequence_len, or write `excess_length_strategy: drop`, `truncate` or `split`."
            )
        if section.excess_length_strategy == "drop":
            outcome(TOO_LONG)
            return []
        split = section.excess_length_strategy == "split"
        outcome(SPLIT if split else CUT)
        pieces = [(ids[at : at + limit], labels[at : at + limit]) for at in range(0, length if split else 1, limit)]
    trained = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORE_INDEX).any()]
    kept = [(ids, labels) for ids, labels in trained if len(ids) >= section.min_sample_len]
    if not kept:
        outcome(TOO_SHORT if trained else UNTRAINED)
    elif len(kept) < len(pieces):
        outcome(SPLIT_IN_PART)
    return kept
