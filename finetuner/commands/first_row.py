"""The look at a dataset's first row for recipes of other tools."""

from collections.abc import Mapping
from typing import Any


def look_at_first_row(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first row of an entry of `datasets`; None if it is not on this disk, or cannot be read."""
    from finetuner.data.first_row import first_row_at_hand  # imports much: most recipes need none of it

    return first_row_at_hand(entry)
