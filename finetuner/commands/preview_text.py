"""Documents of a preview as text for the terminal: trained and special tokens in color, or between marks."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from rich.text import Text

from finetuner.console import Screen
from finetuner.data.packing import Packs
from finetuner.data.preview import SourcePreview, TokenRun, escape_invisible, pack_previews, preview_sources, token_runs
from finetuner.data.row_stream import joins_documents
from finetuner.data.tokenized_rows import build_tokenizer
from finetuner.errors import DataError
from finetuner.recipe import Recipe
from finetuner.recipe.sections import DataSection
from finetuner.report.preview_page import PreviewDocument, render_preview_page
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED, SPECIAL, SPECIAL_TRAINED, NUMBER = "bold green", "magenta", "bold magenta", "dim"


def show_preview(
    recipe: Recipe,
    recipe_name: str,
    screen: Screen,
    *,
    count: int,
    rows: int,
    source: int | None,
    ids: bool,
    html: Path | None,
) -> None:
    """Print `count` documents of the first `rows` rows of each source, and a line on each source.

    `ids`: each token with its id. `html`: a file to write the same to, as a page. Raises FinetunerError."""
    transformers.logging.set_verbosity_error()
    tokenizer = _tokenizer_of(recipe)
    with tempfile.TemporaryDirectory() as folder:
        views = preview_sources(recipe.data, tokenizer, recipe.output.seed, rows=rows, only=source, folder=Path(folder))
        documents = [
            PreviewDocument(
                view, i, list(token_runs(*view.store.document(i), tokenizer, singly=ids or html is not None))
            )
            for view in views
            for i in range(min(count, len(view.store)))
        ]
        colored = screen.terminal and not screen.console.no_color
        for document in documents:
            pieces = token_runs(*document.source.store.document(document.number), tokenizer, singly=ids)
            text = in_color(pieces, ids=ids) if colored else Text(with_marks(pieces, ids=ids))
            screen.line(heading(document.source, document.number))
            screen.console.print(text)
            screen.line()
        packed = recipe.packing.sample_packing and not _is_cut(recipe.data)
        packs = pack_previews(views, recipe.data.sequence_len) if packed else None
        for line in _summary(views, recipe.data, packs, colored=colored):
            screen.line(line)
        if html is not None:
            length = recipe.data.sequence_len
            _write_page(
                html, render_preview_page(recipe_name, views, documents, sequence_len=length, packs=packs, rows=rows)
            )
            screen.line(f"done: {html}")


def _tokenizer_of(recipe: Recipe) -> "PreTrainedTokenizerBase":
    """Load or make the recipe's tokenizer, with the chat template that the recipe chooses."""
    return build_tokenizer(recipe.model, recipe.tokenizer, recipe.data, World()).tokenizer


def _summary(views: list[SourcePreview], section: DataSection, packs: Packs | None, *, colored: bool) -> Iterator[str]:
    yield (
        "green is trained on, magenta a special token"
        if colored
        else "⟦ ⟧ is trained on, ‹ › a special token, ⏎ a new line, ⇥ a tab"
    )
    for view in views:
        yield facts(view)
        yield f"  {view.row_counts.line()}"
    if _is_cut(section):
        yield f"streamed: these texts are joined and cut into rows of {section.sequence_len:,} tokens"
    if packs is not None:
        yield f"{len(packs):,} packs of {packs.capacity:,} tokens, {packs.fill:.1%} full"


def _is_cut(section: DataSection) -> bool:
    return section.streaming and joins_documents(section)


def _write_page(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}.") from error


def heading(view: SourcePreview, number: int) -> str:
    """Line above a document: its source, its number, its tokens and the share that is trained on."""
    _, labels = view.store.document(number)
    trained = int((labels[1:] >= 0).sum())
    share = trained / max(1, len(labels))
    return (
        f"── source {view.number}, document {number} of {view.path}: {len(labels):,} tokens, {trained:,} trained on "
        f"({share:.0%})"
    )


def facts(view: SourcePreview) -> str:
    """Line on a source: its rows, its documents and their lengths."""
    store = view.store
    median = int(sorted(store.lengths)[len(store) // 2])
    return (
        f"source {view.number}, {view.path}: {view.num_rows:,} rows, {len(store):,} documents of {median:,} tokens "
        f"(median; longest {store.longest:,}), {view.trained_share:.1%} of the tokens trained on"
    )


def in_color(pieces: Iterator[TokenRun], *, ids: bool) -> Text:
    """Text for a terminal: trained tokens in green, special tokens in magenta; with `ids`, each token's id."""
    text = Text()
    for piece in pieces:
        style = (SPECIAL_TRAINED if piece.trained else SPECIAL) if piece.special else TRAINED if piece.trained else ""
        text.append(escape_invisible(piece.text), style)
        if ids:
            text.append(f"{_number(piece)} ", NUMBER)
    return text


def with_marks(pieces: Iterator[TokenRun], *, ids: bool) -> str:
    """Text without colors: ⟦trained on⟧, ‹special token›; with `ids`, each token's id."""
    out, trained = "", False
    for piece in pieces:
        if piece.trained != trained:
            out += "⟦" if piece.trained else "⟧"
            trained = piece.trained
        out += f"‹{escape_invisible(piece.text)}›" if piece.special else escape_invisible(piece.text)
        if ids:
            out += f"{_number(piece)} "
    return out + ("⟧" if trained else "")


def _number(piece: TokenRun) -> str:
    return "".join(f"·{one}" for one in piece.ids)
