"""`finetuner preview`: rows as the model sees them, on the terminal and as a page. No model is loaded."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from finetuner.console import Screen
from finetuner.data.inputs import build_tokenizer
from finetuner.data.preview import SourcePreview, TokenRun, escape_invisible, pack_previews, preview_sources, token_runs
from finetuner.data.row_stream import joins_documents
from finetuner.errors import DataError
from finetuner.recipe import Loaded
from finetuner.report.preview_page import PreviewDocument, render_preview_page
from finetuner.world import World

TRAINED, SPECIAL, SPECIAL_TRAINED, NUMBER = "bold green", "magenta", "bold magenta", "dim"


def preview(
    loaded: Loaded, recipe_name: str, *, count: int, rows: int, source: int | None, ids: bool, html: Path | None
) -> None:
    """Show `count` documents of the first `rows` rows of each source. Raises FinetunerError."""
    import transformers

    transformers.logging.set_verbosity_error()
    recipe, screen = loaded.recipe, Screen(speaks=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    tokenizer = build_tokenizer(recipe.model, recipe.tokenizer, recipe.data, World()).tokenizer
    with tempfile.TemporaryDirectory() as folder:
        views = preview_sources(recipe.data, tokenizer, recipe.output.seed, rows=rows, only=source, folder=Path(folder))
        documents = [
            PreviewDocument(
                view, i, list(token_runs(*view.store.document(i), tokenizer, singly=ids or html is not None))
            )
            for view in views
            for i in range(min(count, len(view.store)))
        ]
        coloured = screen.terminal and not screen.console.no_color
        for document in documents:
            pieces = token_runs(*document.source.store.document(document.number), tokenizer, singly=ids)
            screen.line(heading(document.source, document.number))
            screen.console.print(colours(pieces, ids=ids) if coloured else Text(marks(pieces, ids=ids)))
            screen.line()
        cut = recipe.data.streaming and joins_documents(recipe.data)
        packed = recipe.packing.sample_packing and not cut
        packs = pack_previews(views, recipe.data.sequence_len) if packed else None
        screen.line(
            "green is learned, magenta a special token"
            if coloured
            else "⟦ ⟧ is learned, ‹ › a special token, ⏎ a new line, ⇥ a tab"
        )
        for view in views:
            screen.line(facts(view))
        if cut:
            screen.line(f"streamed: these texts are joined and cut into rows of {recipe.data.sequence_len:,} tokens")
        if packs is not None:
            screen.line(f"{len(packs):,} packs of {packs.capacity:,} tokens, {packs.fill:.1%} full")
        if html is not None:
            text = render_preview_page(
                recipe_name, views, documents, sequence_len=recipe.data.sequence_len, packs=packs, rows=rows
            )
            try:
                html.write_text(text, encoding="utf-8")
            except OSError as error:
                raise DataError(f"cannot write '{html}': {error.strerror}.") from error
            screen.line(f"done: {html}")


def heading(view: SourcePreview, number: int) -> str:
    _, labels = view.store.document(number)
    trained = int((labels[1:] >= 0).sum())
    share = trained / max(1, len(labels))
    return (
        f"── source {view.number}, document {number} of {view.path}: {len(labels):,} tokens, {trained:,} learned "
        f"({share:.0%})"
    )


def facts(view: SourcePreview) -> str:
    """What became of a source's rows, in a line."""
    store = view.store
    median = int(sorted(store.lengths)[len(store) // 2])
    dropped = "".join(f"; {count:,} {reason}" for reason, count in sorted(view.counts.items()))
    return (
        f"source {view.number}, {view.path}: {view.num_rows:,} rows, {len(store):,} documents of {median:,} tokens "
        f"(median; longest {store.longest:,}), {view.trained_share:.1%} of the tokens learned{dropped}"
    )


def colours(pieces: Iterator[TokenRun], *, ids: bool) -> Text:
    """For a terminal: what is learned in green, special tokens in magenta."""
    text = Text()
    for piece in pieces:
        style = (SPECIAL_TRAINED if piece.trained else SPECIAL) if piece.special else TRAINED if piece.trained else ""
        text.append(escape_invisible(piece.text), style)
        if ids:
            text.append(f"{_number(piece)} ", NUMBER)
    return text


def marks(pieces: Iterator[TokenRun], *, ids: bool) -> str:
    """The same without colours: ⟦learned⟧, ‹special token›."""
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
