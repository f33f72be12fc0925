"""Render a preview as one HTML page: no script, nothing from a network, light or dark as the reader's system."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np

from finetuner.data.packing import Packs
from finetuner.data.preview import SourcePreview, TokenRun, escape_invisible, preview_lengths
from finetuner.data.token_store import IGNORE_INDEX, Ids

MAX_PACKS = 40  # that are drawn
WIDTH, BAR_HEIGHT, CHART_HEIGHT = 920, 16, 160  # pixels
NUM_BINS = 60  # of the histogram of lengths

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fcfcfa; --soft: #6b7280; --line: #d9dbe0; --card: #f3f4f2;
  --trained: #0b7a43; --trained-back: #d9f2e3; --special: #8a2be2; --bar: #5b84b1; --bar-dark: #2f5d8f;
  --bad: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #14171c; --soft: #9aa2ae; --line: #333a44;
  --card: #1c2129; --trained: #7ee2a8; --trained-back: #173626; --special: #d19bff; --bar: #4b6c90;
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
.t { color: var(--trained); background: var(--trained-back); } .s { color: var(--special); font-weight: 600; }
.sign { opacity: .5; } .id { display: none; color: var(--soft); font-size: 10px; padding: 0 .3em 0 .1em; }
#ids:checked ~ section .id { display: inline; } label { cursor: pointer; }
"""


@dataclass(frozen=True)
class PreviewDocument:
    """Document `number` of a source, as runs of its tokens."""

    source: SourcePreview
    number: int
    runs: list[TokenRun]


def render_preview_page(
    recipe_name: str,
    sources: list[SourcePreview],
    documents: list[PreviewDocument],
    *,
    sequence_len: int,
    packs: Packs | None,
    rows: int,
) -> str:
    """Return the page as HTML; `rows`: the number of rows of each source that were read at most.

    Everything that comes from a row or a recipe is escaped.
    """
    tokens = sum(source.store.num_tokens for source in sources)
    trained = sum(source.store.num_trained for source in sources)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(recipe_name)}: preview</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(recipe_name)}</h1>",
        f"<p>At most the first {rows:,} rows of each source: {tokens:,} tokens, of which {trained:,} are trained on "
        f"({trained / max(1, tokens):.1%}).</p>",
        "<h2>Sources</h2>",
        *_sources_table(sources),
        f"<h2>Lengths, and sequence_len {sequence_len:,}</h2>",
        *_length_histogram(sources, sequence_len),
    ]
    if packs is not None:
        parts += [f"<h2>Packs: {len(packs):,}, {packs.fill:.1%} full</h2>", *_pack_bars(packs)]
    parts += ["<h2>Documents</h2>", *_documents(documents), "</body></html>"]
    return "\n".join(parts)


def _sources_table(sources: list[SourcePreview]) -> Iterator[str]:
    yield '<div class="wide"><table><tr><th>source</th><th>rows</th><th>documents</th><th>tokens</th>'
    yield "<th>trained on</th><th>longest</th><th>rows dropped, cut or split</th></tr>"
    for source in sources:
        lost = "<br>".join(f"{count:,} {escape(reason)}" for reason, count in sorted(source.counts.items())) or "none"
        cells = (source.num_rows, len(source.store), source.store.num_tokens)
        yield (
            f'<tr><td class="path">{source.number}: {escape(source.path)}</td>'
            + "".join(f"<td>{cell:,}</td>" for cell in cells)
            + f"<td>{source.trained_share:.1%}</td><td>{source.store.longest:,}</td>"
            + f'<td class="words">{lost}</td></tr>'
        )
    yield "</table></div>"


def _length_histogram(sources: list[SourcePreview], sequence_len: int) -> Iterator[str]:
    """Yield a chart of documents by length; rows dropped as too long are in another color, right of sequence_len."""
    used, too_long = preview_lengths(sources)
    longest = int(max(used.max(initial=0), too_long.max(initial=0), 1))
    span = max(longest, sequence_len) if longest > sequence_len / 4 else longest
    edges = np.linspace(0, span + 1, NUM_BINS + 1)
    counts = [np.histogram(lengths, edges)[0] for lengths in (used, too_long)]
    highest = int((counts[0] + counts[1]).max())
    yield f'<svg viewBox="0 0 {WIDTH} {CHART_HEIGHT + 34}" role="img" aria-label="documents by length in tokens">'
    bar_width = WIDTH / NUM_BINS
    for i, (num_used, num_too_long) in enumerate(zip(*counts, strict=True)):
        title = f"<title>{edges[i]:.0f} to {edges[i + 1]:.0f} tokens: {num_used + num_too_long:,}</title>"
        y = float(CHART_HEIGHT)
        for count, color in ((num_used, "--bar"), (num_too_long, "--bad")):
            height = CHART_HEIGHT * int(count) / highest
            y -= height
            if count:
                yield _rect(i * bar_width + 1, y, bar_width - 2, height, color, title)
    yield f'<line x1="0" y1="{CHART_HEIGHT}" x2="{WIDTH}" y2="{CHART_HEIGHT}" stroke="var(--line)"/>'
    yield f'<text x="0" y="{CHART_HEIGHT + 16}">0</text>'
    yield f'<text x="0" y="{CHART_HEIGHT + 31}">the highest bar: {highest:,}</text>'
    yield f'<text x="{WIDTH}" y="{CHART_HEIGHT + 16}" text-anchor="end">{span:,} tokens</text>'
    if sequence_len <= span:
        x = WIDTH * sequence_len / (span + 1)
        side = "end" if x > WIDTH / 2 else "start"
        yield (
            f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{CHART_HEIGHT}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
            f'<text x="{x + (-5 if side == "end" else 5):.1f}" y="12" text-anchor="{side}">'
            f"sequence_len {sequence_len:,}</text>"
        )
    yield "</svg>"
    if sequence_len > span:
        yield f"<p>All are shorter than a quarter of sequence_len ({sequence_len:,}).</p>"


def _pack_bars(packs: Packs) -> Iterator[str]:
    """Yield a chart with a bar for each pack, divided into its documents; inner bars are tokens that are trained on."""
    count = min(len(packs), MAX_PACKS)
    yield f'<svg viewBox="0 0 {WIDTH} {count * (BAR_HEIGHT + 5)}" role="img" aria-label="packs">'
    scale = WIDTH / packs.capacity
    for i in range(count):
        y, num_before = i * (BAR_HEIGHT + 5), 0
        yield f'<rect x="0" y="{y}" width="{WIDTH}" height="{BAR_HEIGHT}" fill="none" stroke="var(--line)"/>'
        for ids, labels in packs.documents(i):
            title = f"<title>{len(ids):,} tokens, {int((labels[1:] != IGNORE_INDEX).sum()):,} trained on</title>"
            yield _rect(num_before * scale + 0.5, y, len(ids) * scale - 2, BAR_HEIGHT, "--bar", title)
            for start, stop in _trained_spans(labels):
                left, width = (num_before + start) * scale, (stop - start) * scale
                yield _rect(left, y + 3, width, BAR_HEIGHT - 6, "--bar-dark", title)
            num_before += len(ids)
    yield "</svg>"
    first = f"The first {count} of {len(packs):,}. " if count < len(packs) else ""
    yield f"<p>{first}The inner bars are what is trained on.</p>"


def _trained_spans(labels: Ids) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of trained tokens; `labels`: (tokens,)."""
    borders = np.flatnonzero(np.diff(labels != IGNORE_INDEX, prepend=False, append=False))
    return [(int(a), int(b)) for a, b in borders.reshape(-1, 2)]


def _rect(x: float, y: float, width: float, height: float, color: str, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height:.2f}" fill="var({color})">'
        f"{title}</rect>"
    )


def _documents(documents: list[PreviewDocument]) -> Iterator[str]:
    yield '<input type="checkbox" id="ids"> <label for="ids">token ids</label>'
    yield (
        '<p><span class="t">Trained on</span> and <span>only read</span>; <span class="s">special tokens</span>. '
        "Hold the pointer over a token for its id.</p><section>"
    )
    for document in documents:
        length = document.source.store.length(document.number)
        trained = sum(len(run.ids) for run in document.runs if run.trained)
        name = f"source {document.source.number}, document {document.number}"
        yield f"<p>{name}: {length:,} tokens, {trained:,} trained on</p>"
        yield '<div class="document">' + "".join(_spans(document.runs)) + "</div>"
    yield "</section>"


def _spans(runs: list[TokenRun]) -> Iterator[str]:
    """Yield a span for each run; neighbors that are trained on share a background."""
    for is_trained, neighbors in groupby(runs, key=lambda run: run.trained):
        inner = "".join(map(_span, neighbors))
        yield f'<span class="t">{inner}</span>' if is_trained else inner


def _span(run: TokenRun) -> str:
    ids = "·".join(map(str, run.ids))
    special = " class=s" if run.special else ""
    return f'<span{special} title="{ids}">{_escape(run.text)}<span class="id">{ids}</span></span>'


def _escape(text: str) -> str:
    return escape(escape_invisible(text)).replace("⏎\n", '<span class="sign">⏎</span>\n')
