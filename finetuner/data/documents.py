"""Turn the rows of a dataset into documents that fit, and account for every row that is not among them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from finetuner.data.encoding import Encoder
from finetuner.data.formats import load_format
from finetuner.data.formats.base import Rendered, Renderer
from finetuner.data.pretokenized import read_tokens
from finetuner.data.row_files import Row
from finetuner.data.sources import SourceRow
from finetuner.data.text_ends import without_own_ends
from finetuner.data.token_store import IGNORE_INDEX, Document
from finetuner.data.unused_columns import ColumnCheck
from finetuner.errors import DataError, RowEncodingError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "longer than sequence_len"
TOO_SHORT = "shorter than min_sample_len"
UNTRAINED = "without a trained token"
BAD = "that cannot become text"
BLANK = "of blank text"
CUT = "cut to sequence_len"
SPLIT = "split into several documents"
SPLIT_IN_PART = "split, with parts left out that have nothing to learn or are too short"
DUPLICATE = "equal to an earlier row"
BY_WEIGHT = "left out by the weights of the datasets"
WORDS = "with words like special tokens in their cells, which stay words (`type: completion` reads tokens)"
CHAT_WORDS = "with words like special tokens in their messages, such as an end of turn, which are learned as words"
OWN_ENDS = "with the begin or end of text that is added anyway: it is there once"

# The rows that max_dropped_fraction bounds: cut and split rows are trained on, blank lines of a text are none, and
# equal rows are left out because the recipe says so.
DROPPED = (TOO_LONG, TOO_SHORT, UNTRAINED, BAD)
NOTED = (OWN_ENDS, WORDS, CHAT_WORDS)  # rows that are trained on; they are counted and not listed


class Outcome(NamedTuple):
    """A row that was dropped, cut or split, and the reason. `length`: its tokens, 0 if it has none."""

    source: str
    row: int
    reason: str
    length: int
    detail: str = ""


class MadeDocuments(NamedTuple):
    """Documents of each row (none, one or several), and the rows that were dropped, cut or split.

    `texts`: each row before it was tokenized, as in Texts.
    """

    documents: list[list[Document]]
    outcomes: list[Outcome]
    texts: Sequence[Rendered | Document | None]


class Texts(NamedTuple):
    """Rows before they are tokenized: each a text, a document where the row holds tokens, or None where it is left out.

    Rows that are left out are among the outcomes.
    """

    rows: list[SourceRow]
    texts: list[Rendered | Document | None]
    outcomes: list[Outcome]

    def add(self, other: "Texts") -> None:
        """Put the other rows after these."""
        self.rows.extend(other.rows)
        self.texts.extend(other.texts)
        self.outcomes.extend(other.outcomes)

    @property
    def num_characters(self) -> int:
        return sum(len(text.text) for text in self.texts if isinstance(text, Rendered))


class DocumentMaker:
    """Turns rows of one entry into documents in three steps: render, tokenize, fit.

    The second is the costly one and runs outside Python, so that it can go on while the others work on other rows.
    """

    def __init__(self, entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises DataError if the tokenizer cannot render this entry's rows."""
        self.entry, self.section, self.vocab_size = entry, section, len(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.columns = ColumnCheck.of(entry)
        self.renderer = _renderer(entry, section, tokenizer, self.columns)
        # Far more characters than so many tokens can stand for: not worth the minutes that tokenizing them takes.
        self.hopeless = section.sequence_len * max(map(len, tokenizer.get_vocab())) * 8

    def make(self, rows: Sequence[SourceRow]) -> MadeDocuments:
        """Return the documents of rows.

        Raises DataError at a row that cannot become tokens, unless on_bad_row says to skip it.
        """
        texts = self.render(rows)
        return self.fit_to_length(texts, self.tokenize(texts))

    def render(self, rows: Sequence[SourceRow]) -> Texts:
        """Return the texts of rows. Raises DataError as `make` does."""
        outcomes: list[Outcome] = []
        return Texts(list(rows), [self._text(placed, outcomes) for placed in rows], outcomes)

    def tokenize(self, texts: Texts) -> list[Document]:
        """Return a document for each row that is a text, in their order.

        A prompt that was rendered elsewhere, in a cell where its special tokens are words, joins the outcomes.
        """
        rows = [
            (placed, text) for placed, text in zip(texts.rows, texts.texts, strict=True) if isinstance(text, Rendered)
        ]
        marked = self.encoder.tokenize_and_mark([text for _, text in rows])
        for (placed, text), (_, has_words) in zip(rows, marked, strict=True):
            if has_words:
                said = WORDS if text.wraps else CHAT_WORDS
                texts.outcomes.append(Outcome(placed.file, placed.number, said, 0))
        return [document for document, _ in marked]

    def fit_to_length(self, texts: Texts, tokenized: Sequence[Document]) -> MadeDocuments:
        """Return the documents of rows, cut, split or dropped as the recipe says. `tokenized`: from `tokenize`."""
        documents: list[list[Document]] = []
        outcomes, of_texts = list(texts.outcomes), iter(tokenized)
        for placed, text in zip(texts.rows, texts.texts, strict=True):
            if text is None:
                documents.append([])
                continue
            document = next(of_texts) if isinstance(text, Rendered) else text
            if isinstance(text, Rendered) and not text.spans:  # not even the end that its tokens were given
                document = (document[0], np.full_like(document[1], IGNORE_INDEX))
            if isinstance(text, Rendered) and self.entry.is_plain_text and not text.text.strip():
                outcomes.append(Outcome(placed.file, placed.number, BLANK, 0))
                documents.append([])
                continue
            documents.append(fit_to_length(document, self.section, outcomes, placed))
        return MadeDocuments(documents, outcomes, texts.texts)

    def _text(self, placed: SourceRow, outcomes: list[Outcome]) -> Rendered | Document | None:
        """One row as text or tokens; None for a row that is skipped, which joins the outcomes."""
        try:
            if isinstance(placed.row, DataError):
                raise placed.row
            if self.renderer is not None:
                rendered = self.renderer(placed.row)
                text = without_own_ends(rendered, *self.encoder.ends)
                if text is not rendered:
                    outcomes.append(Outcome(placed.file, placed.number, OWN_ENDS, 0))
                if len(text.text) > self.hopeless and self.section.excess_length_strategy == "drop":
                    outcomes.append(Outcome(placed.file, placed.number, TOO_LONG, 0, f"{len(text.text):,} characters"))
                    return None
                return text
            return read_tokens(placed.row, self.vocab_size, self.columns)
        except (DataError, RecursionError) as caught:
            error = caught if isinstance(caught, DataError) else DataError("its values are nested too deep")
            if self.section.on_bad_row == "raise":
                advice = "\n`on_bad_row: skip` leaves such rows out and lists them."
                if isinstance(error, RowEncodingError):  # to skip them is to lose every row with an accent
                    advice = ""
                raise DataError(f"{placed.file}: row {placed.number}: {error}.{advice}") from None
            outcomes.append(Outcome(placed.file, placed.number, BAD, 0, str(error)))
            return None


def _renderer(
    entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase", columns: ColumnCheck
) -> Renderer | None:
    """Return the renderer of an entry's rows, or None if they hold tokens.

    It also holds a row against the columns that its type reads. Raises DataError if the tokenizer cannot render them.
    """
    if entry.row_format is None:
        return None
    render = load_format(entry.row_format)(entry, section, tokenizer)

    def render_checked(row: Row) -> Rendered:
        knows_all = columns.knows_all(row)
        if not knows_all:
            columns.require_supported(row)
        rendered = render(row)
        if section.train_on_inputs:
            rendered = replace(rendered, spans=((0, len(rendered.text)),))
        if knows_all:
            return rendered
        if not columns.is_trained(row):
            rendered = replace(rendered, spans=())
        ignored = columns.find_ignored(row, rendered)
        return replace(rendered, ignored=ignored + rendered.ignored) if ignored else rendered

    return render_checked


def fit_to_length(
    document: Document, section: DataSection, outcomes: list[Outcome], placed: SourceRow
) -> list[Document]:
    """Return a row's document as it is trained on: none, one, or, if it is split, several.

    A row that is not taken as it is joins `outcomes`. Raises DataError for one that is too long, if the recipe says so.
    """
    ids, labels = document
    limit, length = section.sequence_len, len(ids)

    def outcome(reason: str) -> None:
        outcomes.append(Outcome(placed.file, placed.number, reason, length))

    if length < section.min_sample_len:
        outcome(TOO_SHORT)
        return []
    pieces = [document]
    if length > limit:
        strategy = section.excess_length_strategy
        if strategy == "raise":
            raise DataError(
                f"{placed.file}: row {placed.number}: {length} tokens, but sequence_len is {limit}.\n"
                "Raise sequence_len, or write `excess_length_strategy: drop`, `truncate` or `split`."
            )
        outcome({"drop": TOO_LONG, "truncate": CUT, "split": SPLIT}[strategy])
        stop = {"drop": 0, "truncate": 1, "split": length}[strategy]
        pieces = [(ids[at : at + limit], labels[at : at + limit]) for at in range(0, stop, limit)]
        if not pieces:
            return []
    trained = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORE_INDEX).any()]
    taken = [(ids, labels) for ids, labels in trained if len(ids) >= section.min_sample_len]
    if not taken:
        outcome(TOO_SHORT if trained else UNTRAINED)
    elif len(taken) < len(pieces):
        outcome(SPLIT_IN_PART)
    return taken
