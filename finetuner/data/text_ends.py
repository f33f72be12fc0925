"""Texts that bring the begin or end of text that is put around them anyway: one of the two is enough."""

from dataclasses import replace

from finetuner.data.formats.base import Rendered, Span


def without_own_ends(rendered: Rendered, begin: str | None, end: str | None) -> Rendered:
    """Return the text without the begin and end of text that it has itself; the same object if it has none.

    `begin`, `end`: what will be put before and behind it. White space before the text's own begin, and behind its own
    end, goes with it.

    In a cell of a format other than plain text, words that look like special tokens are words, and `<s>...</s>` is also
    HTML's for struck text. There a lone end counts as the row's own end of text only if no begin stands before it in
    the last cell, and a lone begin only if no end follows.
    """
    if not rendered.wraps:
        return rendered
    text = rendered.text
    first, last = text[:1], text[-1:]
    may_begin = begin and (first == begin[:1] or first.isspace())
    if not may_begin and not (end and (last == end[-1:] or last.isspace())):  # nearly all
        return rendered
    start, stop = 0, len(text)
    head, tail = text.lstrip(), text.rstrip()
    if begin and head.startswith(begin):
        start = len(text) - len(head) + len(begin)
    if end and tail.endswith(end) and len(tail) - len(end) >= start:
        stop = len(tail) - len(end)
    if rendered.contents and begin and end:
        if start and stop == len(text) and end in text[start:]:
            start = 0
        elif not start and stop < len(text) and begin in text[rendered.contents[-1][0] : stop]:
            stop = len(text)
    if (start, stop) == (0, len(text)):
        return rendered
    return replace(
        rendered,
        text=text[start:stop],
        spans=_moved(rendered.spans, start, stop),
        contents=_moved(rendered.contents, start, stop),
    )


def _moved(spans: tuple[Span, ...], start: int, stop: int) -> tuple[Span, ...]:
    """The parts of the spans within [start, stop), counted from `start`."""
    return tuple((max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and b > start)
