"""Rows in files, and the type of the fixture that writes recipes for them."""

import json
import string
from collections.abc import Callable
from pathlib import Path

RecipeWriter = Callable[..., Path]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alpaca_rows(count: int) -> list[dict]:
    """Rows of unequal length."""
    words = list(string.ascii_lowercase[:15])
    return [
        {
            "instruction": " ".join(words[: 2 + i % 5]) + f" {i}?",
            "input": "" if i % 3 else "given " * (1 + i % 4),
            "output": " ".join(words[i % 4 : i % 4 + 1 + (7 * i) % 11]) + ".",
        }
        for i in range(count)
    ]
