"""One row as its text, with the characters that are trained on."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetuner.data.documents import DocumentMaker
from finetuner.data.formats.base import Rendered
from finetuner.data.sources import SourceRow
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

SHAREGPT = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}


def render_row(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    kind: Any = "chat_template",
    *,
    data: Any = None,
    **keys: Any,
) -> Rendered:
    """Return a row as an entry with these keys renders it; `data`: keys of the recipe beside its datasets."""
    return render_with(make_maker(tokenizer, kind, data=data, **keys), row)


def make_maker(tokenizer: PreTrainedTokenizerBase, kind: Any, *, data: Any = None, **keys: Any) -> DocumentMaker:
    entry = {"path": "rows.jsonl", "type": kind, **keys}
    section = DataSection.model_validate({"datasets": [entry], **(data or {})})
    return DocumentMaker(section.datasets[0], section, tokenizer)


def render_with(maker: DocumentMaker, row: dict[str, Any]) -> Rendered:
    (text,) = maker.render([SourceRow(row, "rows.jsonl", 0)]).texts
    assert isinstance(text, Rendered)
    return text


def trained_parts(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def refusal_of(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], kind: Any = "chat_template", **keys: Any
) -> str:
    """Return the message with which a row is refused."""
    with pytest.raises(DataError) as caught:
        render_row(tokenizer, row, kind, **keys)
    return str(caught.value)
