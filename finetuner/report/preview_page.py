"""A preview as one HTML page: no script, nothing from a network, light or dark as the reader's system is."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np

from finetuner.data.packing import Packs
from finetuner.data.preview import Shown, SourceView, lengths_of, visible
from finetuner.data.token_store import IGNORE, Ids

MAX_BARS = 40
WIDTH, BAR, CHART = 920, 16, 160  # pixels
NUM_BINS = 60

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fcfcfa; --soft: #6b7280; --line: #d9dbe0; --card: #f3f4f2;
  --learned: #0b7a43; --learned-back: #d9f2e3; --special: #8a2be2; --bar: #5b84b1; --bar-dark: #2f5d8f;
  --bad: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #14171c; --soft: #9aa2ae; --line: #333a44;
  --card: #1c2129; --learned: #7ee2a8; --learned-back: #173626; --special: #d19bff; --bar: #4b6c90;
  --bar-dark: #8fb8e6; --bad: #fb923c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } p, caption { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child, th:first-child, td.words, th:last-child { text-align: left; } td { font-variant-numeric: tabular-nums; }
td.path { overflow-wrap: anywhere; min-width: 19rem; }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.document { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  margin: .4rem 0 1.4rem; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; }
.t { color: var(--learned); background: var(--learned-back); } .s { color: var(--special); font-weight: 600; }
.sign { opacity: .5; } .id { display: none; color: var(--soft); font-size: 10px; padding: 0 .3em 0 .1em; }
#ids:checked ~ section .id { display: inline; } label { cursor: pointer; }
"""


@dataclass(frozen=True)
class Document:
    """Document `number` of a source, token by token."""

    view: SourceView
    number: int
    pieces: list[Shown]


def page(
    recipe_name: str,
    views: list[SourceView],
    documents: list[Document],
    *,
    sequence_len: int,
    packs: Packs | None,
    rows: int,
) -> str:
    """The whole page. Everything that comes from a row or a recipe is escaped."""
    tokens = sum(view.store.num_tokens for view in views)
    trained = sum(view.store.num_trained for view in views)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(recipe_name)}: preview</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(recipe_name)}</h1>",
        f"<p>At most the first {rows:,} rows of each source: {tokens:,} tokens, of which {trained:,} are learned "
        f"({trained / max(1, tokens):.1%}).</p>",
        "<h2>Sources</h2>",
        *_sources(views),
        f"<h2>Lengths, and sequence_len {sequence_len:,}</h2>",
        *_histogram(views, sequence_len),
    ]
    if packs is not None:
        parts += [f"<h2>Packs: {len(packs):,}, {packs.fill:.1%} full</h2>", *_bars(packs)]
    parts += ["<h2>Documents</h2>", *_documents(documents), "</body></html>"]
    return "\n".join(parts)


def _sources(views: list[SourceView]) -> Iterator[str]:
    yield '<div class="wide"><table><tr><th>source</th><th>rows</th><th>documents</th><th>tokens</th>'
    yield "<th>learned</th><th>longest</th><th>rows that are not learned as they stand</th></tr>"
    for view in views:
        lost = "<br>".join(f"{count:,} {escape(reason)}" for reason, count in sorted(view.counts.items())) or "none"
        cells = (view.num_rows, len(view.store), view.store.num_tokens)
        yield (
            f'<tr><td class="path">{view.number}: {escape(view.path)}</td>'
            + "".join(f"<td>{cell:,}</td>" for cell in cells)
            + f"<td>{view.trained_share:.1%}</td><td>{view.store.longest:,}</td>"
            + f'<td class="words">{lost}</td></tr>'
        )
    yield "</table></div>"


def _histogram(views: list[SourceView], sequence_len: int) -> Iterator[str]:
    """Documents by length; rows that are too long in another colour, right of the line at sequence_len."""
    kept, lost = lengths_of(views)
    top = int(max(kept.max(initial=0), lost.max(initial=0), 1))
    span = max(top, sequence_len) if top > sequence_len / 4 else top
    edges = np.linspace(0, span + 1, NUM_BINS + 1)
    counts = [np.histogram(lengths, edges)[0] for lengths in (kept, lost)]
    highest = int((counts[0] + counts[1]).max())
    yield f'<svg viewBox="0 0 {WIDTH} {CHART + 34}" role="img" aria-label="documents by length in tokens">'
    wide = WIDTH / NUM_BINS
    for i, (good, bad) in enumerate(zip(*counts, strict=True)):
        title = f"<title>{edges[i]:.0f} to {edges[i + 1]:.0f} tokens: {good + bad:,}</title>"
        at = float(CHART)
        for count, colour in ((good, "--bar"), (bad, "--bad")):
            high = CHART * int(count) / highest
            at -= high
            if count:
                yield _rect(i * wide + 1, at, wide - 2, high, colour, title)
    yield f'<line x1="0" y1="{CHART}" x2="{WIDTH}" y2="{CHART}" stroke="var(--line)"/>'
    yield f'<text x="0" y="{CHART + 16}">0</text><text x="0" y="{CHART + 31}">the highest bar: {highest:,}</text>'
    yield f'<text x="{WIDTH}" y="{CHART + 16}" text-anchor="end">{span:,} tokens</text>'
    if sequence_len <= span:
        at = WIDTH * sequence_len / (span + 1)
        side = "end" if at > WIDTH / 2 else "start"
        yield (
            f'<line x1="{at:.1f}" y1="0" x2="{at:.1f}" y2="{CHART}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
            f'<text x="{at + (-5 if side == "end" else 5):.1f}" y="12" text-anchor="{side}">'
            f"sequence_len {sequence_len:,}</text>"
        )
    yield "</svg>"
    if sequence_len > span:
        yield f"<p>All are shorter than a quarter of sequence_len ({sequence_len:,}).</p>"


def _bars(packs: Packs) -> Iterator[str]:
    """Each pack a bar, each document a part of it, with bars in it for what is learned."""
    count = min(len(packs), MAX_BARS)
    yield f'<svg viewBox="0 0 {WIDTH} {count * (BAR + 5)}" role="img" aria-label="packs">'
    scale = WIDTH / packs.capacity
    for i in range(count):
        top, at = i * (BAR + 5), 0
        yield f'<rect x="0" y="{top}" width="{WIDTH}" height="{BAR}" fill="none" stroke="var(--line)"/>'
        for ids, labels in packs.documents(i):
            title = f"<title>{len(ids):,} tokens, {int((labels[1:] != IGNORE).sum()):,} learned</title>"
            yield _rect(at * scale + 0.5, top, len(ids) * scale - 2, BAR, "--bar", title)
            for start, stop in _runs(labels):
                yield _rect((at + start) * scale, top + 3, (stop - start) * scale, BAR - 6, "--bar-dark", title)
            at += len(ids)
    yield "</svg>"
    first = f"The first {count} of {len(packs):,}. " if count < len(packs) else ""
    yield f"<p>{first}The inner bars are what is learned.</p>"


def _runs(labels: Ids) -> list[tuple[int, int]]:
    borders = np.flatnonzero(np.diff(labels != IGNORE, prepend=False, append=False))
    return [(int(a), int(b)) for a, b in borders.reshape(-1, 2)]


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height:.2f}" fill="var({colour})">'
        f"{title}</rect>"
    )


def _documents(documents: list[Document]) -> Iterator[str]:
    yield '<input type="checkbox" id="ids"> <label for="ids">token ids</label>'
    yield (
        '<p><span class="t">Learned</span> and <span>only read</span>; <span class="s">special tokens</span>. '
        "Hold the pointer over a token for its id.</p><section>"
    )
    for document in documents:
        length = document.view.store.length(document.number)
        trained = sum(len(piece.ids) for piece in document.pieces if piece.trained)
        yield (
            f"<p>source {document.view.number}, document {document.number}: {length:,} tokens, {trained:,} learned</p>"
        )
        yield '<div class="document">' + "".join(_tokens(document.pieces)) + "</div>"
    yield "</section>"


def _tokens(pieces: list[Shown]) -> Iterator[str]:
    """One span for each token; neighbours that are learned share a background."""
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        inner = "".join(
            f'<span{" class=s" if piece.special else ""} title="{"·".join(map(str, piece.ids))}">{_signed(piece.text)}'
            f'<span class="id">{"·".join(map(str, piece.ids))}</span></span>'
            for piece in run
        )
        yield f'<span class="t">{inner}</span>' if trained else inner


def _signed(text: str) -> str:
    return escape(visible(text)).replace("⏎\n", '<span class="sign">⏎</span>\n')
