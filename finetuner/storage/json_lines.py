"""Files of one JSON object a line, which grow by a line at a time and may lose the last one to a kill."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetuner.storage.atomic import staged_file


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all lines before the first that a kill cut short; none if there is no file."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` in place of what the file holds: all of them or, after a kill, none of them."""
    with staged_file(path) as staging:
        staging.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add `rows` to the end of the file. They outlive this process, but not a power cut."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
