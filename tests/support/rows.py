"""Rows in files, and the type of the fixture that writes recipes for them."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def texts(path: Path, name: str, count: int) -> dict[str, Any]:
    rows = [{"text": f"{name}{i} " + "word " * ((7 * i) % 23)} for i in range(count)]
    return {"path": str(write_rows(path / f"{name}.jsonl", rows)), "type": "completion"}
