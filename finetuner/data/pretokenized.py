"""Read rows that hold token ids already: those of an entry without a `type`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from finetuner.data.formats.base import cell_of
from finetuner.data.token_store import IGNORE_INDEX, Document
from finetuner.data.unused_columns import ColumnCheck
from finetuner.errors import DataError


def read_tokens(row: Mapping[str, Any], vocab_size: int, check: ColumnCheck) -> Document:
    """Return (ids, labels) of a row with the columns `input_ids` and `labels`.

    Padding, where the column `attention_mask` is 0, is left out. Raises DataError if a cell is no list of token ids of
    this vocabulary, the columns differ in length, or `check` finds a column that says more.
    """
    columns = []
    for name in ("input_ids", "labels"):
        cell = cell_of(row, name)
        try:
            columns.append(np.array(cell, dtype=np.int64).reshape(-1))
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"column '{name}' must be a list of token ids; it is {cell!r:.60}") from None
    ids, labels = columns
    if row.get("position_ids") is not None and list(row["position_ids"]) == list(range(len(ids))):
        row = {name: value for name, value in row.items() if name != "position_ids"}  # they are counted anyway
    check.find_ignored(row, None)
    if not check.is_trained(row):
        labels = np.full_like(labels, IGNORE_INDEX)
    cell = row.get("attention_mask")
    mask = np.ones(len(ids), dtype=bool) if cell is None else np.array(cell, dtype=bool)
    if not len(ids) == len(labels) == len(mask):
        raise DataError(f"{len(ids)} input_ids, {len(labels)} labels and {len(mask)} attention_mask must be equal many")
    ids, labels = ids[mask], labels[mask]
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise DataError(f"input_ids has {wrong[0]}, but the tokenizer's ids are 0 to {vocab_size - 1}")
    strange = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))]
    if len(strange):
        raise DataError(
            f"labels has {strange[0]}, but must be token ids, or {IGNORE_INDEX} where nothing is trained on"
        )
    return ids.astype(np.int32), labels.astype(np.int32)
